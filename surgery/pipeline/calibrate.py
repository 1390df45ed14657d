"""The calibration stage: the plan's open decisions made, on training text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from surgery.calibration import Calibration, make_calibrated_plan
from surgery.config.schema import ExportFormat, RunConfig
from surgery.console import is_rank_zero, say, show
from surgery.errors import ConfigError, PlanError, SurgeryError
from surgery.execute.live import apply_
from surgery.importance import ScoreTable
from surgery.importance.estimate import Scorer
from surgery.measure.loss import measure_held_out_loss
from surgery.models.sites import Site
from surgery.pipeline.deferred import immediate_operations
from surgery.pipeline.session import Session
from surgery.plan.operation import Operation
from surgery.plan.plan import Plan
from surgery.plan.render import plan_table
from surgery.plan.store import load_plan, save_plan

# How long other processes wait for the one that calibrates.
PATIENCE = 4 * 3600.0


def calibrate(session: Session) -> None:
    """Close the plan; one process does it, the others read what it wrote.

    Raises:
        SurgeryError: the others cannot see it.
    """
    if not is_rank_zero():
        session.plan = _awaited(session.run_dir, session.plan)
        return
    # Training draws the same numbers as without this stage.
    with torch.random.fork_rng():
        operations = immediate_operations(session.run)
        scorer = _scorer(session, operations, kept=True)
        session.plan = _calibrated(session, session.loaded(), operations, scorer)
    save_plan(session.plan, session.run_dir)
    show(plan_table(session.plan))


def compare(session: Session) -> dict[str, Any] | None:
    """What the better way of an operation gives on this very model and data; ``None`` for none.

    The original is loaded again, operated and evaluated; the run's own model is not touched. A
    model for which it is no way is no mistake of this run: that is said, and the run goes on.
    """
    operations = immediate_operations(session.run)
    alternatives = [operation.alternative() for operation in operations]
    found = [alternative for alternative in alternatives if alternative is not None]
    if not found or session.data is None:
        return None
    better = [
        operation if alternative is None else alternative.operation
        for operation, alternative in zip(operations, alternatives, strict=True)
    ]
    run, start, name = session.run, time.perf_counter(), ", ".join(one.name for one in found)
    with torch.random.fork_rng():
        model = session.source.load().to(session.device)  # type: ignore[arg-type]
        try:
            scorer = _scorer(session, better, kept=False)
            model = apply_(model, _calibrated(session, model, better, scorer))
        except (ConfigError, PlanError) as error:
            say(f"  {name} is not for this model: {error.args[0].splitlines()[0]}")
            return None
        loss = measure_held_out_loss(model, session.data, run.measure, run.model.task, label=name)
    return {
        "name": name,
        "advice": "; ".join(one.advice for one in found),
        **{key: value for one in found for key, value in one.figures.items()},
        "loss": loss,
        "windows": run.calibration.windows,
        "refine_steps": run.calibration.refine_steps,
        "seconds": round(time.perf_counter() - start, 3),
    }


def _calibrated(
    session: Session, model: PreTrainedModel, operations: list[Operation], scorer: Scorer | None
) -> Plan:
    run, plan = session.run, session.plan
    assert session.data is not None
    return make_calibrated_plan(
        model,
        operations,
        session.data.draw_calibration_batches(run.calibration.windows, run.calibration.batch_size),
        options_of(run),
        scorer,
        name=session.source.name,
        seed=run.seed,
        tokens=plan.tokens,
        kv_bytes=plan.kv_bytes,
        device=str(session.device),
        native=run.export.format is ExportFormat.native,
    )


def _scorer(session: Session, operations: list[Operation], *, kept: bool) -> Scorer | None:
    """Who scores heads, if any operation asks; `kept`: the tables it makes are written down."""
    if not any(operation.scored_by for operation in operations):
        return None
    from surgery.pipeline.importance import keep, scorer_of

    scorer = scorer_of(session)
    if not kept:
        return scorer

    def keeping(
        model: PreTrainedModel, sites: Sequence[Site], estimator: str, unit: str
    ) -> ScoreTable:
        table = scorer(model, sites, estimator, unit)
        keep(session, table)
        return table

    return keeping


def options_of(run: RunConfig) -> Calibration:
    """`calibration.*`, in batches where it counts windows."""
    cfg = run.calibration
    return Calibration(
        rows=cfg.rows,
        refine_steps=cfg.refine_steps,
        keep_batches=max(1, cfg.keep_windows // cfg.batch_size),
        refit=cfg.refit,
        ridge=cfg.ridge,
        seed=run.seed,
    )


def _awaited(run_dir: Path, planned: Plan) -> Plan:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            found = load_plan(run_dir)
        except PlanError:
            found = None
        same = found is not None and found.model == planned.model
        if same and found is not None and found.is_resolved and found.calibration is not None:
            return found
        time.sleep(1.0)
    raise SurgeryError(
        f"no calibrated plan in {run_dir} after {PATIENCE / 3600:g} hours: all processes of a run "
        "need one hydra.run.dir"
    )


def say_comparison(found: dict[str, Any], before: float, after_surgery: float) -> None:
    """One line: the gap that this way opened, and the one that the better would have."""
    opened, would = after_surgery - before, found["loss"] - before
    share = f", {would / opened:.0%} of it" if opened > 0 else ""
    say(
        f"surgery opened a gap of {opened:.3f} nats before training; {found['name']} would have "
        f"opened {would:.3f}{share} (measured in {found['seconds']:.0f} s): {found['advice']}"
    )
