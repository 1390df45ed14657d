"""A whole run, from a composed config to a directory of results."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import set_seed

from surgery.config.schema import RunConfig, Stage
from surgery.config.validate import checked
from surgery.console import is_rank_zero
from surgery.execute.live import apply_
from surgery.files import write_json, write_text
from surgery.pipeline.prepare import check_writable, prepare
from surgery.pipeline.report import report, report_again
from surgery.pipeline.session import Session
from surgery.pipeline.summary import summarize
from surgery.report.summary import SCHEMA, SUMMARY, schema_text


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
    _stages(session, run)
    session.timings["total"] = time.perf_counter() - start
    if is_rank_zero():
        write_text(run_dir / SCHEMA, schema_text())
        write_json(run_dir / SUMMARY, summarize(session))
        if session.has(Stage.report):
            report(session.run_dir)


def _stages(session: Session, run: RunConfig) -> None:
    set_seed(run.seed)
    if run.threads:
        torch.set_num_threads(run.threads)
    if session.has(Stage.plan):
        _plan(session)
    _measure(session, "before")
    if session.has(Stage.operate) and session.plan.changes_anything:
        model = session.loaded()
        with session.stage("operate"):
            session.model = apply_(model, session.plan)
        _measure(session, "after_surgery")
    if session.has(Stage.train):
        from surgery.pipeline.train import train

        with session.stage("train"):
            train(session)
        _measure(session, "after_training")
    if session.has(Stage.export) and is_rank_zero():
        from surgery.pipeline.export import export

        with session.stage("export"):
            export(session)


def _plan(session: Session) -> None:
    from surgery.console import show
    from surgery.plan.render import plan_table

    if is_rank_zero():
        write_json(session.run_dir / "plan.json", session.plan.to_json())
        show(plan_table(session.plan))


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
