"""The stage `measure`: losses, sizes and times of the model, up to three times in a run."""

from __future__ import annotations

from dataclasses import replace

from surgery.config.schema import Task, TaskMode
from surgery.console import say
from surgery.measure import measure_model
from surgery.measure.loss import measure_held_out_loss
from surgery.measure.unigram import compute_unigram_loss, describe_misfit
from surgery.models.probe import get_vocabulary_size
from surgery.pipeline.session import Session
from surgery.pipeline.tasks import measure_tasks

# Enough to tell another language from the model's own.
FEW_WINDOWS = 8


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
        if moment == "before":
            cfg = session.run.measure
            judge_text(session, session.results.measurements[moment].loss, cfg.windows)


def judge_text_alone(session: Session) -> None:
    """Judge the text by a few windows, where the stage `measure` does not run."""
    data, run = session.data, session.run
    if data.count_held_out_rows() == 0:
        return
    cfg = replace(run.measure, windows=min(FEW_WINDOWS, run.measure.windows))
    model = session.load_model()
    loss = measure_held_out_loss(model, data, cfg, run.model.task, label="original")
    judge_text(session, loss, cfg.windows)


def judge_text(session: Session, loss: float, windows: int) -> None:
    """Note what the original's loss is beside that of counting tokens; warn where it is no better.

    Args:
        loss: of the original, on `windows` held-out windows.
    """
    data, task = session.data, session.run.model.task
    if task is Task.sequence_classification:
        return
    vocabulary = get_vocabulary_size(session.load_model().config)
    unigram = compute_unigram_loss(data, task, windows=windows, vocabulary=vocabulary)
    warning = describe_misfit(loss, unigram, data.held_out_key)
    session.results.text = {"loss": loss, "unigram_loss": unigram, "warning": warning}
    said = f"the original's loss on the held-out text is {loss:.4f} nats per token"
    say(f"  {said}; the frequencies of its tokens alone give {unigram:.4f}")
    if warning is not None:
        say(f"  {warning}")
