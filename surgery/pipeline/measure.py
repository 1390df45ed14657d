"""The stage `measure`: losses, sizes and times of the model, up to three times in a run."""

from __future__ import annotations

from surgery.config.schema import TaskMode
from surgery.measure import measure_model
from surgery.pipeline.session import Session
from surgery.pipeline.tasks import measure_tasks


def measure(session: Session, moment: str) -> None:
    """Measure the model as it is now.

    Args:
        moment: before, after_surgery or after_training.
    """
    model, label = session.load_model(), moment.replace("_", " ")
    with session.time_stage(f"measure {label}"):
        session.results.measurements[moment] = measure_model(
            model,
            session.data,
            session.run.measure,
            session.run.model.task,
            label=label,
            tokens=session.plan.tokens,
            operations=() if moment == "before" else session.immediate,
        )
        if session.run.tasks.mode is TaskMode.one_mask:
            measure_tasks(session, moment)
