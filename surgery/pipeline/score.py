"""The stage `score`: how much the loss depends on each head of the model."""

from __future__ import annotations

import torch

from surgery.config.schema import TaskMode
from surgery.console import show
from surgery.lab.report.importance import tabulate_scores
from surgery.pipeline.scorer import keep_scores, make_scorer
from surgery.pipeline.session import Session
from surgery.pipeline.tasks import compare_tasks


def score(session: Session) -> None:
    """Score every head, and write the table and its picture; with several tasks, compare them."""
    if session.prepared.task_data and session.run.tasks.mode is TaskMode.compare:
        compare_tasks(session)
        return
    model, estimator = session.load_model(), session.run.importance.estimator
    with torch.random.fork_rng():
        table = make_scorer(session)(model, (), estimator, "both")
    keep_scores(session, table)
    show(tabulate_scores(table.to_json()))
