"""Importance of every head: the stage `score`, and who scores heads for `prune_heads`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from surgery.config.schema import TaskMode
from surgery.console import is_rank_zero, say, show
from surgery.data.collate import Batch
from surgery.data.module import TextData
from surgery.importance.estimate import Scorer, score_heads
from surgery.importance.table import GROUPS, HEADS, ScoreTable
from surgery.lab.report.importance import draw_scores, scores_table
from surgery.models.sites import Site
from surgery.pipeline.session import Session

FILE = "importance.json"
PICTURE = "importance.png"


def score(session: Session) -> None:
    """Score every head of the model as it is; write the table and its picture."""
    if not is_rank_zero():
        return
    if session.task_data and session.run.tasks.mode is TaskMode.compare:
        from surgery.pipeline.tasks import compare_tasks

        compare_tasks(session)
        return
    model, estimator = session.loaded(), session.run.importance.estimator
    with torch.random.fork_rng():
        table = scorer_of(session)(model, (), estimator, "both")
    keep(session, table)
    show(scores_table(table.to_json()))


def keep(session: Session, table: ScoreTable) -> None:
    """Write a table beside the run's other results, and remember it for the summary."""
    table.save(session.run_dir / FILE)
    draw_scores(table.to_json(), session.run_dir / PICTURE)
    session.scores = table
    say(f"  scores of {table.estimator}: {FILE}, {PICTURE}")


def scorer_of(session: Session) -> Scorer:
    """Scores on the run's own training text, as `importance.*` says.

    A unit of ``both`` stands for heads and groups; no sites stand for all of them.
    """
    if session.task_data and session.run.tasks.mode is TaskMode.one_mask:
        from surgery.pipeline.tasks import combined_scorer

        return combined_scorer(session)
    assert session.data is not None
    batches = importance_batches(session, session.data)

    def scored(
        model: PreTrainedModel, sites: Sequence[Site], estimator: str, unit: str
    ) -> ScoreTable:
        return score_on(session, batches, model, sites, estimator, unit)

    return scored


def importance_batches(session: Session, data: TextData) -> list[Batch]:
    """`importance.windows` training windows of some data."""
    cfg = session.run.importance
    return data.draw_importance_batches(cfg.windows, cfg.batch_size)


def score_on(
    session: Session,
    batches: Sequence[Batch],
    model: PreTrainedModel,
    sites: Sequence[Site],
    estimator: str,
    unit: str,
    *,
    data_name: str | None = None,
) -> ScoreTable:
    """`surgery.importance.estimate.score_heads` with the run's options."""
    run = session.run
    return score_heads(
        model,
        batches,
        estimator,
        sites=list(sites) or None,
        units=(HEADS, GROUPS) if unit == "both" else (unit,),
        task=run.model.task,
        objective=run.importance.objective,
        seed=run.seed,
        memory_rows=run.importance.memory_windows,
        model_name=session.source.name,
        data_name=run.data.kind.value if data_name is None else data_name,
    )
