"""A whole run, from a composed config to a directory of results."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import set_seed

from surgery.config.schema import RunConfig, Stage, TaskMode
from surgery.config.validate import checked
from surgery.console import is_rank_zero
from surgery.execute.live import apply_
from surgery.files import write_json, write_text
from surgery.lab.report.summary import SCHEMA, SUMMARY, read_schema
from surgery.pipeline.log import closing_loggers, send_results
from surgery.pipeline.prepare import check_writable, prepare
from surgery.pipeline.report import report, report_again
from surgery.pipeline.session import Session
from surgery.pipeline.summary import summarize
from surgery.plan.store import forget_plan


def execute(cfg: DictConfig) -> None:
    """Check everything, then run the stages that were asked for.

    Raises:
        SurgeryError: something cannot be done; nothing half-written is left.
    """
    start = time.perf_counter()
    run = checked(cfg)
    run_dir = Path(run.run_dir)
    check_writable(run_dir)
    if set(run.stages) == {Stage.report}:
        report_again(run_dir)
        return
    settings = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(settings, dict)
    session = prepare(run, run_dir, {str(key): value for key, value in settings.items()})
    if is_rank_zero():
        write_text(run_dir / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    perform(session, start)


def perform(session: Session, start: float) -> None:
    """The stages of a prepared run, and what they leave in its directory.

    Args:
        start: when it began, by `time.perf_counter`.
    """
    with closing_loggers(session):
        _stages(session, session.run)
        session.timings["total"] = time.perf_counter() - start
        if is_rank_zero():
            _keep(session)


def _keep(session: Session) -> None:
    """Everything that is written, sent and said at the end."""
    if session.tasks:
        from surgery.pipeline.tasks import keep_tasks

        keep_tasks(session)
    summary = summarize(session)
    write_text(session.run_dir / SCHEMA, read_schema())
    write_json(session.run_dir / SUMMARY, summary)
    if session.has(Stage.report):
        report(session.run_dir)
    send_results(session, summary)
    if session.comparison is not None:
        _say_comparison(session)


def _stages(session: Session, run: RunConfig) -> None:
    set_seed(run.seed)
    if run.threads:
        torch.set_num_threads(run.threads)
    if is_rank_zero():
        forget_plan(session.run_dir)
    if session.has(Stage.plan):
        _plan(session)
    if session.task_runs:
        from surgery.pipeline.each_task import run_each

        run_each(session)
        return
    _measure(session, "before")
    if session.has(Stage.score):
        from surgery.pipeline.importance import score

        with session.stage("score"):
            score(session)
    if session.has(Stage.analyze):
        from surgery.pipeline.analysis import analyze

        with session.stage("analyze"):
            analyze(session)
    if session.has(Stage.calibrate) and not session.plan.is_resolved:
        from surgery.pipeline.calibrate import calibrate

        with session.stage("calibrate"):
            calibrate(session)
    if session.has(Stage.operate) and session.plan.changes_anything:
        model = session.loaded()
        with session.stage("operate"):
            session.model = apply_(model, session.plan)
        _measure(session, "after_surgery")
        _compare(session)
    if session.has(Stage.train):
        from surgery.pipeline.train import train

        with session.stage("train"):
            train(session)
        _cut(session)
        _measure(session, "after_training")
    if session.has(Stage.export) and is_rank_zero():
        from surgery.pipeline.export import export

        with session.stage("export"):
            export(session)


def _plan(session: Session) -> None:
    from surgery.console import show
    from surgery.plan.render import plan_table
    from surgery.plan.store import save_plan

    if is_rank_zero():
        save_plan(session.whole_plan, session.run_dir)
        show(plan_table(session.whole_plan))


def _cut(session: Session) -> None:
    """Remove what training closed, where an operation was left to it."""
    if session.deferred is None:
        return
    from surgery.pipeline.deferred import perform_deferred

    with session.stage("cut"):
        perform_deferred(session)
        _plan(session)


def _say_comparison(session: Session) -> None:
    from surgery.pipeline.calibrate import say_comparison

    assert session.comparison is not None
    losses = [session.measurements[moment].loss for moment in ("before", "after_surgery")]
    say_comparison(session.comparison, *losses)


def _compare(session: Session) -> None:
    wanted = session.run.calibration.compare and session.has(Stage.calibrate)
    if not wanted or "after_surgery" not in session.measurements or not is_rank_zero():
        return
    from surgery.pipeline.calibrate import compare

    with session.stage("compare"):
        session.comparison = compare(session)


def _measure(session: Session, moment: str) -> None:
    if not session.has(Stage.measure) or not is_rank_zero():
        return
    from surgery.measure import measure_model

    model = session.loaded()
    assert session.data is not None
    label = moment.replace("_", " ")
    with session.stage(f"measure {label}"):
        session.measurements[moment] = measure_model(
            model, session.data, session.run.measure, session.run.model.task, label=label
        )
        if session.run.tasks.mode is TaskMode.one_mask:
            from surgery.pipeline.tasks import measure_tasks

            measure_tasks(session, moment)
