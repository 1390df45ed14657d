"""The stage `calibrate`: make the plan's open decisions, on training text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from surgery.calibration import Calibration, make_calibrated_plan
from surgery.config.schema import RunConfig
from surgery.console import is_rank_zero, show
from surgery.errors import PlanError, SurgeryError
from surgery.importance.estimate import Scorer
from surgery.pipeline.scorer import keep_tables, make_scorer
from surgery.pipeline.session import Session
from surgery.plan.amount import count_windows
from surgery.plan.operation import Operation
from surgery.plan.plan import Plan
from surgery.plan.render import build_plan_table
from surgery.plan.store import load_plan, save_plan

# How long other processes wait for the one that calibrates.
PATIENCE = 4 * 3600.0


def calibrate(session: Session) -> None:
    """Close the plan: one process makes the decisions, the others read the plan that it writes.

    Raises:
        SurgeryError: the others cannot read it.
    """
    if not is_rank_zero():
        session.adopt_plan(_await_plan(session.run_dir, session.plan))
        return
    # Training draws the same numbers as without this stage.
    with torch.random.fork_rng():
        session.adopt_plan(close_plan(session, session.load_model(), session.immediate, keep=True))
    # Calibration may have chosen other counts per layer than the plan assumed.
    degree = session.run.export.tensor_parallel
    if degree is not None and session.deferred is None:
        session.plan.check_tensor_parallel(degree)
    save_plan(session.plan, session.run_dir)
    show(build_plan_table(session.plan))


def close_plan(
    session: Session, model: PreTrainedModel, operations: Sequence[Operation], *, keep: bool
) -> Plan:
    """Make a plan of `operations` without open decisions, on the run's training text.

    Args:
        model: the source, which is not changed.
        keep: whether score tables that are made for it are kept among the results.
    """
    run = session.run
    scorer: Scorer | None = None
    if any(operation.scored_by for operation in operations):
        scorer = make_scorer(session)
        scorer = keep_tables(session, scorer) if keep else scorer
    windows = count_windows(run.calibration.windows, session.plan.source, run.data.seq_len)
    plan = make_calibrated_plan(
        model,
        operations,
        session.data.draw_calibration_batches(windows, run.calibration.batch_size),
        make_options(run),
        scorer,
        **session.prepared.planning,
    )
    if session.data.own is None or plan.calibration is None:
        return plan
    return replace(plan, calibration={**plan.calibration, "data": session.data.describe()})


def make_options(run: RunConfig) -> Calibration:
    """Turn `calibration.*` into options that count batches, not windows."""
    cfg = run.calibration
    keep = cfg.keep_windows
    return Calibration(
        rows=cfg.rows,
        refine_steps=cfg.refine_steps,
        keep_batches=None if keep is None else max(1, keep // cfg.batch_size),
        joint_steps=cfg.joint_steps,
        refit=cfg.refit,
        ridge=cfg.ridge,
        seed=run.seed,
    )


def _await_plan(run_dir: Path, planned: Plan) -> Plan:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            plan = load_plan(run_dir)
        except PlanError:
            plan = None
        same = plan is not None and plan.model == planned.model
        if same and plan is not None and plan.is_resolved and plan.calibration is not None:
            return plan
        time.sleep(1.0)
    raise SurgeryError(
        f"no calibrated plan in {run_dir} after {PATIENCE / 3600:g} hours: all processes of a run "
        "need one hydra.run.dir"
    )
