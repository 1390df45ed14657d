"""After healing: the untrained weights come back if the measured loss is higher than theirs."""

from __future__ import annotations

import math

from surgery.config.schema import Kept, Stage
from surgery.console import say
from surgery.execute.live import apply_
from surgery.lab.report.healing import describe_healing
from surgery.pipeline.session import Session

# Relative: two passes over the same windows with the same weights may differ by this.
_SAME = 1e-6


def revert_if_worse(session: Session) -> None:
    """Take the untrained weights instead of those that healing chose, if these do worse.

    Other windows have chosen them, and a small gain there may be none on the measured ones. Where
    training has decided on an operation there is no model to go back to, and nothing is done.
    """
    results, run = session.results, session.run
    measured, training = results.measurements, results.training
    moment = "after_surgery" if session.plan.changes_anything else "before"
    untrained, healed = measured.get(moment), measured.get("after_training")
    if untrained is None or healed is None or run.validation.keep is not Kept.best:
        return
    if training["decision"] is not None or healed.loss <= untrained.loss * (1 + _SAME):
        return
    with session.time_stage("revert"):
        session.model = None  # its memory is needed
        model = session.load_again()
        if session.plan.changes_anything:
            model = apply_(model, session.plan)
        session.model = model.to(session.device)  # type: ignore[arg-type]
    held_out = training["held_out"]
    training["reverted"] = {
        "step": held_out["kept_step"] if held_out else training["steps"],
        "loss": healed.loss if math.isfinite(healed.loss) else None,
        "untrained_loss": untrained.loss,
    }
    measured["after_training"] = untrained
    losses = results.tasks.get("losses", {})
    if "after_training" in losses and moment in losses:
        losses["after_training"] = losses[moment]
    for line in describe_healing(training, exported=session.has(Stage.export)):
        say(f"  {line}")
