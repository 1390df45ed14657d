"""Run the stages of a prepared run, in their order.

Each has its own file. Those that need Lightning, datasets, matplotlib or scipy are imported
when they run: that takes seconds, and a run that only plans does not need them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from surgery.config.schema import Stage
from surgery.console import is_rank_zero, say
from surgery.files import write_json, write_text
from surgery.lab.report.summary import SCHEMA, SUMMARY, read_schema
from surgery.pipeline.cut import cut
from surgery.pipeline.export import export
from surgery.pipeline.files import KEPT, REPORT, RESULT_PICTURE, remove_drafts
from surgery.pipeline.log import finish_loggers, send_results
from surgery.pipeline.operate import operate, write_plan
from surgery.pipeline.rate import say_rates
from surgery.pipeline.revert import revert_if_worse
from surgery.pipeline.session import Session
from surgery.pipeline.summary import summarize
from surgery.plan.store import forget_plan
from surgery.signals import Stopped, naming_stage

# Stages that have the model loaded before training builds its own.
_LOADING = {Stage.measure, Stage.score, Stage.analyze, Stage.calibrate, Stage.operate}


def run_stages(session: Session, start: float) -> None:
    """Run the stages, and write their results into the run directory.

    Args:
        start: when the run began, by `time.perf_counter`.
    """
    with _naming_checkpoint(session), finish_loggers(session):
        begin(session)
        _sample_data(session)
        _check_head(session)
        _measure(session, "before")
        _sample_text(session, "before")
        _judge_text(session)
        _observe_heads(session)
        _operate(session)
        _train(session)
        if session.has(Stage.export) and is_rank_zero():
            with session.time_stage("export"):
                export(session)
        summary = finish(session, start)
        if summary is not None:
            send_results(session, summary)
            _say_comparison(session)


@contextmanager
def _naming_checkpoint(session: Session) -> Iterator[None]:
    """Tell a signal that ends the run after training which checkpoint there is."""
    try:
        yield
    except Stopped as stop:
        checkpoint = session.results.training.get("checkpoint")
        if stop.checkpoint is None and checkpoint is not None:
            stop.checkpoint = session.run_dir / checkpoint
        raise


def begin(session: Session) -> None:
    """Do what comes before the first stage, and the stage `plan`."""
    set_seed(session.run.seed)
    if session.run.threads:
        torch.set_num_threads(session.run.threads)
    if is_rank_zero():
        forget_earlier_run(session.run_dir)
    if session.has(Stage.plan):
        with naming_stage("plan"):
            write_plan(session)
            if session.has(Stage.train):
                say_rates(session)


def forget_earlier_run(run_dir: Path) -> None:
    """Remove what says that the run in this directory is complete, and what was not finished.

    Other results of an earlier run stay until this one writes its own; a line names them.
    """
    remove_drafts(run_dir)
    forget_plan(run_dir)
    for name in (SUMMARY, SCHEMA, REPORT, RESULT_PICTURE):
        (run_dir / name).unlink(missing_ok=True)
    kept = [path.name for pattern in KEPT for path in sorted(run_dir.glob(pattern))]
    if kept:
        say(f"  of an earlier run, until this one writes its own: {', '.join(kept)}")


def finish(session: Session, start: float) -> dict[str, Any] | None:
    """Write and return the summary, and run the stage `report`; ``None`` if another process does.

    Args:
        start: when the run began, by `time.perf_counter`.
    """
    session.results.timings["total"] = time.perf_counter() - start
    if not is_rank_zero():
        return None
    if session.results.tasks:
        from surgery.pipeline.tasks import write_tasks

        write_tasks(session)
    summary = summarize(session)
    write_text(session.run_dir / SCHEMA, read_schema())
    write_json(session.run_dir / SUMMARY, summary)
    if session.has(Stage.report):
        from surgery.pipeline.report import report

        with naming_stage("report"):
            report(session.run_dir)
    return summary


def _sample_data(session: Session) -> None:
    """Sample the text of `data=self` from the original; processes read what the first one wrote."""
    prepared = session.prepared
    own = [data for data in (prepared.data, *prepared.task_data.values()) if data and data.own]
    if not own:
        return
    with session.time_stage("sample"):
        loaded = set(session.run.stages) & _LOADING
        model = session.load_model() if loaded else session.source.load().to(session.device)  # type: ignore[arg-type]
        for data in own:
            data.sample(model)


def _measure(session: Session, moment: str) -> None:
    if session.has(Stage.measure) and is_rank_zero():
        from surgery.pipeline.measure import measure

        measure(session, moment)


def _sample_text(session: Session, moment: str) -> None:
    if session.has(Stage.measure) and session.has(Stage.report) and is_rank_zero():
        from surgery.pipeline.sample import sample

        sample(session, moment)


def _judge_text(session: Session) -> None:
    """Judge the text by the original's loss on it, where no stage has measured that."""
    reads = session.has(Stage.score) or session.has(Stage.analyze)
    reads = reads or (session.has(Stage.calibrate) and not session.plan.is_resolved)
    if reads and not session.has(Stage.measure) and is_rank_zero():
        from surgery.pipeline.measure import judge_text_alone

        judge_text_alone(session)


def _check_head(session: Session) -> None:
    if is_rank_zero() and (session.has(Stage.score) or session.has(Stage.calibrate)):
        from surgery.pipeline.scorer import check_head

        check_head(session)


def _observe_heads(session: Session) -> None:
    """Run the stages that observe heads; they change nothing."""
    if session.has(Stage.score):
        from surgery.pipeline.score import score

        with session.time_stage("score"):
            if is_rank_zero():
                score(session)
    if session.has(Stage.analyze):
        from surgery.pipeline.analyze import analyze

        with session.time_stage("analyze"):
            if is_rank_zero():
                analyze(session)


def _operate(session: Session) -> None:
    if session.has(Stage.calibrate) and not session.plan.is_resolved:
        from surgery.pipeline.calibrate import calibrate

        with session.time_stage("calibrate"):
            calibrate(session)
    if session.has(Stage.operate) and session.plan.changes_anything:
        operate(session)
        _measure(session, "after_surgery")
        _sample_text(session, "after_surgery")
        _compare(session)


def _compare(session: Session) -> None:
    wanted = session.run.calibration.compare and session.has(Stage.calibrate)
    if wanted and "after_surgery" in session.results.measurements:
        from surgery.pipeline.compare import compare

        with session.time_stage("compare"):
            compare(session)


def _say_comparison(session: Session) -> None:
    comparison, measured = session.results.comparison, session.results.measurements
    if comparison is not None:
        from surgery.pipeline.compare import say_comparison

        say_comparison(comparison, measured["before"].loss, measured["after_surgery"].loss)


def _train(session: Session) -> None:
    if not session.has(Stage.train):
        return
    from surgery.pipeline.train import train

    with session.time_stage("train"):
        decision = train(session)
    if session.deferred is not None:
        with session.time_stage("cut"):
            cut(session, decision)
            write_plan(session)
    _measure(session, "after_training")
    if is_rank_zero():
        revert_if_worse(session)
    _sample_text(session, "after_training")
