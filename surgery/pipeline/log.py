"""Send to the loggers what is no training curve: the result, and the files that a run made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from surgery.config.schema import LoggerKind, Stage
from surgery.lab.report.comparable import flatten_summary
from surgery.pipeline.files import ANALYSIS, HEADS, IMPORTANCE, IMPORTANCE_PICTURE, TASKS_PICTURE
from surgery.pipeline.session import Session
from surgery.plan.store import PLAN, TENSORS
from surgery.training.identity import compute_fingerprint, identify_model

# A run of only these has nothing to show on a dashboard.
_SILENT = {Stage.plan, Stage.report}


def is_logged(stages: set[Stage]) -> bool:
    """Whether a run of these stages has anything to send."""
    return bool(stages - _SILENT)


def open_loggers(session: Session) -> None:
    """Open one logger for each of `logger.kinds`, unless they are open."""
    from surgery.training.loggers import build_loggers  # seconds, for Lightning

    if session.loggers:
        return
    # The learning rate is known now, even if the config has null; runs are compared by it.
    optim = dict(session.settings.get("optim") or {}) | {"lr": session.run.optim.lr}
    settings = {**session.settings, "optim": optim}
    session.loggers = build_loggers(session.run.logger, session.run_dir, settings)


@contextmanager
def finish_loggers(session: Session) -> Iterator[None]:
    """End the W&B run when the pipeline ends; as failed if the pipeline raises."""
    failed = True
    try:
        yield
        failed = False
    finally:
        if session.loggers:
            from surgery.training.loggers import finish_runs  # seconds, for Lightning

            finish_runs(session.loggers, failed=failed)


def send_results(session: Session, summary: Mapping[str, Any]) -> None:
    """Send figures to compare runs by, and artifacts. Call it on rank zero, after all files.

    Args:
        summary: what `summary.json` holds.
    """
    if LoggerKind.wandb not in session.run.logger.kinds or not is_logged(set(session.run.stages)):
        return
    from surgery.training.loggers import list_wandb_runs  # seconds, for Lightning

    open_loggers(session)
    for run in list_wandb_runs(session.loggers):
        _send_lineage(session, run)
        _send_tables(session, run)
        run.summary.update(flatten_summary(summary))


def _send_lineage(session: Session, run: Any) -> None:
    from surgery.training.artifacts import log_export, log_original, log_plan  # seconds, for wandb

    about: dict[str, Any] = {"operations": [dict(one) for one in session.whole_plan.operations]}
    about["made_from"] = [log_original(run, identify_model(session.source))]
    upload = session.run.logger.upload_export
    files = [session.run_dir / name for name in (PLAN, TENSORS)]
    files = [file for file in files if file.is_file()]
    if files and session.whole_plan.changes_anything:
        plan = log_plan(run, about, files, upload=upload)
        about["made_from"] = [*about["made_from"], plan]
    export = session.results.export
    if export:
        folder = session.run_dir / export["path"]
        about |= export | {"fingerprint": compute_fingerprint(folder)}
        log_export(run, about, folder, upload=upload)


def _send_tables(session: Session, run: Any) -> None:
    from surgery.training.artifacts import (  # seconds, for wandb
        log_tables,
        show_picture,
        show_scores,
    )

    folder, results = session.run_dir, session.results
    own = results.scores.get(IMPORTANCE)
    if own is not None:
        show_scores(run, own.to_arrow())
        show_picture(run, "head_scores", folder / IMPORTANCE_PICTURE, own.estimator)
    for name, table in results.scores.items():
        files = [folder / f"{name}{end}" for end in (".json", ".parquet")]
        log_tables(run, name, table.describe(), files)
    if results.tasks.get("losses"):
        show_picture(run, "tasks", folder / TASKS_PICTURE, session.run.tasks.mode.value)
    heads = [folder / ANALYSIS / f"{HEADS}{end}" for end in (".json", ".parquet")]
    if results.analysis and all(file.is_file() for file in heads):
        log_tables(run, "analysis", {"model": session.source.name}, heads)
