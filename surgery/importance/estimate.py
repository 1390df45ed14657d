"""Scores of a model's heads: batches through one estimator, into one table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from surgery.config.schema import ObjectiveName, Task
from surgery.console import say, track_progress
from surgery.errors import ConfigError
from surgery.importance.check import check_estimator
from surgery.importance.control import random_scores
from surgery.importance.gate_gradient import GateGradient
from surgery.importance.leave_one_out import LeaveOneOut
from surgery.importance.losses import targets
from surgery.importance.output_norm import OutputNorm
from surgery.importance.table import GROUPS, HEADS, UNITS, ScoreTable, SiteScores
from surgery.importance.work import Batch, BatchScores, Scores, Work
from surgery.models.sites import Site, find_sites

# Scores some sites of a model: (model, sites, estimator, unit) → table.
Scorer = Callable[[PreTrainedModel, Sequence[Site], str, str], ScoreTable]

_MEASURED: dict[str, Callable[[Work], Callable[[Batch], BatchScores]]] = {
    "gate_gradient": GateGradient,
    "output_norm": OutputNorm,
    "leave_one_out": LeaveOneOut,
}
_UNIT_OF_SCORES = {"output_norm": "norm", "random": "none"}


def score_heads(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    estimator: str,
    *,
    sites: Sequence[Site] | None = None,
    units: Sequence[str] = UNITS,
    task: Task = Task.causal_lm,
    objective: ObjectiveName = ObjectiveName.lm,
    seed: int = 0,
    memory_rows: int = 32,
    model_name: str = "",
    data_name: str = "",
) -> ScoreTable:
    """How much hangs on every query head and KV group of `model`, which is left as it is.

    A score is the mean over batches, each weighted by what it was measured on (labelled positions,
    or examples for gate_gradient and output_norm); its error is the standard error of that mean.

    Args:
        batches: arguments of forward passes with their ``labels`` ([B, N], -100 where nothing is
            predicted; [B] for classes). ``random`` looks at none, and output_norm needs no labels.
        estimator: one of `ESTIMATORS`.
        sites: those to score; by default, all that the model has.
        units: ``heads``, ``groups`` (a KV head with the query heads that share it), or both.
        objective: what is lost: lm, the label loss; distill, KL from the model as it is.
        seed: of what is drawn (random).
        memory_rows: most rows that run side by side in leave_one_out, ablations included.
        model_name, data_name: for the table.

    Raises:
        ConfigError: an unknown estimator or unit, a model without sites, an objective that the
            estimator cannot have, or batches without labels.
    """
    check_estimator("importance.estimator", estimator, objective)
    if not units or any(unit not in UNITS for unit in units):
        raise ConfigError("importance.units", "are not known", given=list(units), valid=UNITS)
    if memory_rows < 1:
        raise ConfigError("importance.memory_windows", "must be at least 1", given=memory_rows)
    sites = find_sites(model).sites if sites is None else tuple(sites)
    if not sites:
        raise ConfigError(
            "model", "has no attention whose heads could be scored", given=type(model).__name__
        )
    work = Work(model, sites, tuple(units), task, objective, seed, memory_rows)
    if estimator == "random":
        scores = random_scores(work)
        unknown = {u: [torch.full_like(row, math.nan) for row in scores[u]] for u in scores}
        return _table(work, estimator, scores, unknown, [], model_name, data_name)
    measured = _measured(work, estimator, list(batches))
    found, errors = average(measured)
    return _table(work, estimator, found, errors, measured, model_name, data_name)


def average(measured: Sequence[BatchScores]) -> tuple[Scores, Scores]:
    """Weighted means over batches, and their standard errors; NaN for a single batch.

    With weights w summing to 1 the error is sqrt(n / (n - 1) sum w^2 (x - mean)^2); for equal
    ones, the standard deviation over sqrt(n).
    """
    weights = torch.tensor([one.weight for one in measured], dtype=torch.float64)
    weights = (weights / weights.sum())[:, None]
    count = len(measured)
    means: Scores = {}
    errors: Scores = {}
    for unit in measured[0].scores:
        means[unit], errors[unit] = [], []
        for rows in zip(*(one.scores[unit] for one in measured), strict=True):
            values = torch.stack(rows)
            mean = (weights * values).sum(0)
            squares = (weights * (values - mean)).square().sum(0)
            means[unit].append(mean)
            errors[unit].append(
                (squares * count / (count - 1)).sqrt() if count > 1 else mean * math.nan
            )
    return means, errors


def _measured(work: Work, estimator: str, batches: Sequence[Batch]) -> list[BatchScores]:
    if not batches:
        raise ConfigError("importance.windows", "there is no batch to score heads on", given=0)
    measure = _MEASURED[estimator](work)
    device = next(work.model.parameters()).device
    found = []
    with at_rest(work.model), track_progress(f"importance, {estimator}", len(batches)) as steps:
        for batch in batches:
            batch = {name: value.to(device) for name, value in batch.items()}
            if estimator != "output_norm":
                _check_labels(batch, estimator)
            if estimator == "output_norm" or targets(batch["labels"], work.task).total:
                found.append(measure(batch))
            steps.advance()
    if not found:
        raise ConfigError("data", "no batch has a labelled position, so no loss to score heads by")
    if len(found) < len(batches):
        say(f"  {len(batches) - len(found)} batches have no labelled position and were left out")
    return found


def _check_labels(batch: Batch, estimator: str) -> None:
    if "labels" not in batch:
        raise ConfigError(
            "importance.estimator",
            "needs labels, and the batches have none",
            given=estimator,
            valid="output_norm or random, which look at no loss",
        )


@contextmanager
def at_rest(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout and without gradients of parameters; afterwards as it was."""
    training = [module for module in model.modules() if module.training]
    learning = [one for one in model.parameters() if one.requires_grad]
    model.eval()
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


def _table(
    work: Work,
    estimator: str,
    scores: Scores,
    errors: Scores,
    measured: Sequence[BatchScores],
    model_name: str,
    data_name: str,
) -> ScoreTable:
    sites = {
        unit: tuple(
            SiteScores(site.layer, site.path, tuple(row.tolist()), tuple(spread.tolist()))
            for site, row, spread in zip(work.sites, scores[unit], errors[unit], strict=True)
        )
        for unit in work.units
    }
    tokens = sum(one.tokens for one in measured)
    losses = [one.loss * one.tokens for one in measured if one.loss is not None]
    return ScoreTable(
        estimator=estimator,
        objective=work.objective.value,
        heads=sites.get(HEADS),
        groups=sites.get(GROUPS),
        model=model_name,
        data=data_name,
        batches=len(measured),
        tokens=tokens,
        seed=work.seed,
        loss=sum(losses) / tokens if losses else None,
        unit_of_scores=_UNIT_OF_SCORES.get(estimator, "nats"),
    )
