"""Make what scores heads in a run: on its own training text, or on that of all its tasks."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from surgery.config.schema import ObjectiveName, Stage, TaskMode
from surgery.console import say
from surgery.data.collate import Batch
from surgery.data.module import TextData
from surgery.errors import ConfigError
from surgery.importance.estimate import Scorer, score_heads
from surgery.importance.table import BY_LOSS, GROUPS, HEADS, ScoreTable
from surgery.lab.report.importance import draw_scores
from surgery.lab.tasks import combine_scores
from surgery.lab.tasks.agreement import correlate_tasks
from surgery.models.sites import Site
from surgery.models.untrained import list_random_weights
from surgery.pipeline.files import IMPORTANCE, IMPORTANCE_PICTURE, name_scores
from surgery.pipeline.session import Session


def check_head(session: Session) -> None:
    """Check before any work that scores by the label loss are of a head that was trained.

    Raises:
        ConfigError: the checkpoint does not have it, so it is random.
    """
    run = session.run
    estimators = [o.scored_by for o in session.immediate if session.has(Stage.calibrate)]
    if session.has(Stage.score):
        estimators.append(run.importance.estimator)
    by_loss = [estimator for estimator in estimators if estimator in BY_LOSS]
    if not by_loss or run.importance.objective is not ObjectiveName.lm:
        return
    untrained = list_random_weights(session.load_model())
    if untrained:
        raise ConfigError(
            "model.path",
            f"{untrained[-1]} is not in the checkpoint, so it is random, and {by_loss[0]} measures "
            "the loss behind it",
            given=run.model.path,
            valid="a checkpoint with a trained head, or an estimator that needs no loss: "
            "output_norm, random",
        )


def make_scorer(session: Session) -> Scorer:
    """Make a scorer on the run's own training text, or on that of its tasks.

    The unit ``both`` means heads and groups; empty sites mean all sites.
    """
    run = session.run
    if session.prepared.task_data and run.tasks.mode is TaskMode.one_mask:

        def score_together(
            model: PreTrainedModel, sites: Sequence[Site], estimator: str, unit: str
        ) -> ScoreTable:
            tables = score_tasks(session, model, sites, estimator, unit)
            return combine_scores(tables, run.tasks.combine, run.tasks.weights)

        return score_together
    batches = _pick_batches(session, session.data)

    def score(
        model: PreTrainedModel, sites: Sequence[Site], estimator: str, unit: str
    ) -> ScoreTable:
        return _score(session, batches, model, sites, estimator, unit, session.data.describe())

    return score


def keep_tables(session: Session, scorer: Scorer, *, first: bool = False) -> Scorer:
    """Make a scorer that also keeps its tables among the results.

    Args:
        first: keep a table only if the run has none yet.
    """

    def score_and_keep(
        model: PreTrainedModel, sites: Sequence[Site], estimator: str, unit: str
    ) -> ScoreTable:
        table = scorer(model, sites, estimator, unit)
        if not first or IMPORTANCE not in session.results.scores:
            keep_scores(session, table)
        return table

    return score_and_keep


def keep_scores(session: Session, table: ScoreTable) -> None:
    """Write the run's table and its picture, and keep it for the summary."""
    file = f"{IMPORTANCE}.json"
    table.save(session.run_dir / file)
    draw_scores(table.to_json(), session.run_dir / IMPORTANCE_PICTURE)
    session.results.scores[IMPORTANCE] = table
    say(f"  scores of {table.estimator}: {file}, {IMPORTANCE_PICTURE}")


def score_tasks(
    session: Session, model: PreTrainedModel, sites: Sequence[Site], estimator: str, unit: str
) -> dict[str, ScoreTable]:
    """Score heads for each task, and write ``importance-<task>.json`` and `.parquet`."""
    tables = {}
    for name, data in session.prepared.task_data.items():
        say(f"  scores for {name}")
        batches = _pick_batches(session, data)
        table = _score(session, batches, model, sites, estimator, unit, name)
        table.save(session.run_dir / f"{name_scores(name)}.json")
        session.results.scores[name_scores(name)] = tables[name] = table
    session.results.tasks |= {"estimator": estimator, "spearman": correlate_tasks(tables)}
    return tables


def _pick_batches(session: Session, data: TextData) -> list[Batch]:
    """Draw `importance.windows` training windows."""
    cfg = session.run.importance
    return data.draw_importance_batches(cfg.windows, cfg.batch_size)


def _score(
    session: Session,
    batches: Sequence[Batch],
    model: PreTrainedModel,
    sites: Sequence[Site],
    estimator: str,
    unit: str,
    data_name: str,
) -> ScoreTable:
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
        data_name=data_name,
    )
