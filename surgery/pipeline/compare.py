"""The comparison of `calibration.compare`: a better way of an operation, on this model and data."""

from __future__ import annotations

import time
from typing import Any

import torch

from surgery.console import say
from surgery.errors import ConfigError, PlanError, get_first_line
from surgery.execute.live import apply_
from surgery.measure.loss import measure_held_out_loss
from surgery.pipeline.calibrate import close_plan
from surgery.pipeline.session import Session


def compare(session: Session) -> None:
    """Perform the better way on a fresh copy of the original, and evaluate it.

    If no operation has a better way, nothing is done. If it is not for this model, a line says so,
    and the run continues.
    """
    alternatives = [(operation, operation.find_alternative()) for operation in session.immediate]
    operations = [mine if better is None else better.operation for mine, better in alternatives]
    found = [better for _, better in alternatives if better is not None]
    if not found:
        return
    run, start, name = session.run, time.perf_counter(), ", ".join(one.name for one in found)
    with torch.random.fork_rng():
        model = session.source.load().to(session.device)  # type: ignore[arg-type]
        try:
            plan = close_plan(session, model, operations, keep=False)
            if plan.changes == session.plan.changes:  # nothing to do better in these layers
                return
            model = apply_(model, plan)
        except (ConfigError, PlanError) as error:
            say(f"  {name} is not for this model: {get_first_line(error)}")
            return
        loss = measure_held_out_loss(model, session.data, run.measure, run.model.task, label=name)
    session.results.comparison = {
        "name": name,
        "advice": "; ".join(one.advice for one in found),
        **{key: value for one in found for key, value in one.figures.items()},
        "loss": loss,
        "windows": (plan.calibration or {}).get("windows"),
        "refine_steps": run.calibration.refine_steps,
        "seconds": round(time.perf_counter() - start, 3),
    }


def say_comparison(comparison: dict[str, Any], before: float, after_surgery: float) -> None:
    """Print in one line the gap that this way opened, and that of the better way."""
    opened, would = after_surgery - before, comparison["loss"] - before
    share = f", {would / opened:.0%} of it" if opened > 0 else ""
    say(
        f"surgery opened a gap of {opened:.3f} nats before training; {comparison['name']} would "
        f"have opened {would:.3f}{share} (measured in {comparison['seconds']:.0f} s): "
        f"{comparison['advice']}"
    )
