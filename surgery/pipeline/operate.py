"""The stages `plan` and `operate`: write and show the plan, and perform it on the model."""

from __future__ import annotations

from surgery.console import is_rank_zero, say, show
from surgery.execute.live import apply_
from surgery.pipeline.session import Session
from surgery.plan.render import build_plan_table
from surgery.plan.store import save_plan


def write_plan(session: Session) -> None:
    """Write the plan and show it, on rank zero only."""
    if is_rank_zero():
        save_plan(session.whole_plan, session.run_dir)
        show(build_plan_table(session.whole_plan))
        data = session.prepared.data
        if data is not None and data.own is not None:
            say(f"  data: {data.describe()}")


def operate(session: Session) -> None:
    """Perform the plan on the model."""
    model = session.load_model()
    with session.time_stage("operate"):
        session.model = apply_(model, session.plan)
