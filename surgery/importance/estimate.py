"""Score the heads of a model: run batches through one estimator and fill one table."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from surgery.config.schema import ObjectiveName, Task
from surgery.console import say, track_progress
from surgery.data.collate import Batch
from surgery.errors import ConfigError
from surgery.importance.batches import check_labels, find_task, prepare_batches
from surgery.importance.gate_gradient import GateGradient
from surgery.importance.leave_one_out import LeaveOneOut
from surgery.importance.losses import find_labelled_positions
from surgery.importance.output_norm import OutputNorm
from surgery.importance.table import BY_LOSS, GROUPS, HEADS, UNITS, ScoreTable, SiteScores
from surgery.importance.work import BatchScores, Scores, Work, check_estimator
from surgery.models.editable import check_values
from surgery.models.forward import evaluating, find_device
from surgery.models.packed import make_inputs
from surgery.models.sites import Site, find_sites
from surgery.models.untrained import list_random_weights

# Scores some sites of a model: (model, sites, estimator, unit) → table.
Scorer = Callable[[PreTrainedModel, Sequence[Site], str, str], ScoreTable]

_MEASURED: dict[str, Callable[[Work], Callable[[Batch], BatchScores]]] = {
    "gate_gradient": GateGradient,
    "output_norm": OutputNorm,
    "leave_one_out": LeaveOneOut,
}
# On a model about whose head a line was printed.
_SAID = "_surgery_said_untrained"
_UNIT_OF_SCORES = {"output_norm": "norm", "random": "none"}


def score_heads(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    estimator: str,
    *,
    sites: Sequence[Site] | None = None,
    units: Sequence[str] = UNITS,
    task: Task | None = None,
    objective: ObjectiveName = ObjectiveName.lm,
    seed: int = 0,
    memory_rows: int = 32,
    model_name: str = "",
    data_name: str = "",
) -> ScoreTable:
    """Score every query head and KV group of `model`: how much is lost without it.

    A score is the mean over batches. A batch weighs as much as was measured on it: labelled
    positions, or examples for gate_gradient and output_norm. The error of a score is the standard
    error of that mean. The model stays as it is.

    Args:
        batches: arguments of forward passes with their ``labels`` ([B, N], -100 where nothing is
            predicted; [B] for classes). ``random`` uses no batches, output_norm needs no labels.
        estimator: one of `ESTIMATORS`.
        sites: the sites to score; by default all sites of the model.
        units: ``heads``, ``groups`` (a KV head with the query heads that share it), or both.
        task: what the labels are labels of; by default what `find_task` finds.
        objective: which loss: lm, the label loss; distill, KL from the unchanged model.
        seed: for random scores.
        memory_rows: most rows that run side by side in leave_one_out, ablations included.
        model_name, data_name: for the table.

    Raises:
        ConfigError: the estimator or a unit is unknown, the model has no sites, the estimator
            cannot use this objective, or the batches or their labels are not what it needs.
    """
    check_estimator("importance.estimator", estimator, objective)
    if not units or any(unit not in UNITS for unit in units):
        raise ConfigError("importance.units", "unknown units", given=list(units), valid=UNITS)
    if memory_rows < 1:
        raise ConfigError("importance.memory_windows", "must be at least 1", given=memory_rows)
    check_values(model)
    sites = find_sites(model).sites if sites is None else tuple(sites)
    if not sites:
        raise _explain_no_sites(model)
    rows = [] if estimator == "random" else prepare_batches(model, batches)
    task = find_task(model, rows) if task is None else task
    work = Work(model, sites, tuple(units), task, objective, seed, memory_rows)
    if estimator == "random":
        scores = draw_random_scores(work)
        unknown = {u: [torch.full_like(row, math.nan) for row in scores[u]] for u in scores}
        return _make_table(work, estimator, scores, unknown, [], model_name, data_name)
    if estimator in BY_LOSS and objective is ObjectiveName.lm:
        _say_untrained(model)
    measured = _measure_batches(work, estimator, rows)
    means, errors = average_batches(measured)
    return _make_table(work, estimator, means, errors, measured, model_name, data_name)


def _say_untrained(model: PreTrainedModel) -> None:
    """Say once that the loss is of a head that loading left random."""
    untrained = list_random_weights(model)
    if untrained and not hasattr(model, _SAID):
        setattr(model, _SAID, True)
        say(
            f"  {untrained[-1]} was not in the checkpoint: unless it was trained since, it is "
            "random and scores by the loss mean nothing"
        )


def _explain_no_sites(model: PreTrainedModel) -> ConfigError:
    reasons = [f": {block.path}: {block.reason}" for block in find_sites(model).unreadable[:1]]
    problem = f"has no attention heads that can be scored{''.join(reasons)}"
    return ConfigError("model", problem, given=type(model).__name__)


def draw_random_scores(work: Work) -> Scores:
    """Draw scores uniformly from [0, 1): the control that every other estimator must beat.

    They depend only on the seed, the path of the site and the unit. Where a group is one head,
    heads and groups get the same numbers.
    """
    scores: Scores = {}
    for unit in work.units:
        scores[unit] = []
        for site in work.sites:
            name = HEADS if site.group_size == 1 else unit
            seed = zlib.crc32(f"{work.seed}/{site.path}/{name}".encode())
            generator = torch.Generator().manual_seed(seed)
            count = site.q_heads if name == HEADS else site.kv_heads
            scores[unit].append(torch.rand(count, generator=generator, dtype=torch.float64))
    return scores


def average_batches(measured: Sequence[BatchScores]) -> tuple[Scores, Scores]:
    """Average scores over batches; return weighted means and their standard errors.

    With weights w that sum to 1 the error is sqrt(n / (n - 1) sum w^2 (x - mean)^2). For equal
    weights this is the standard deviation over sqrt(n). For a single batch it is NaN.
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


def _measure_batches(work: Work, estimator: str, batches: Sequence[Batch]) -> list[BatchScores]:
    if not batches:
        raise ConfigError("importance.windows", "there are no batches to score heads on", given=0)
    measure = _MEASURED[estimator](work)
    device = find_device(work.model)
    measured = []
    with freezing(work.model), track_progress(f"importance, {estimator}", len(batches)) as steps:
        for batch in batches:
            batch = {name: value.to(device) for name, value in batch.items()}
            if estimator != "output_norm":
                check_labels(batch, estimator, work.task)
            if (
                estimator == "output_norm"
                or find_labelled_positions(batch["labels"], work.task).total
            ):
                # It may ask the model about packed documents, which no estimator's hook may see.
                make_inputs(work.model, batch)
                measured.append(measure(batch))
            steps.advance()
    if not measured:
        raise ConfigError("data", "no batch has a labelled position, so there is no loss to score")
    if len(measured) < len(batches):
        left_out = len(batches) - len(measured)
        say(f"  {left_out} batches have no labelled position and were left out")
    return measured


@contextmanager
def freezing(model: PreTrainedModel) -> Iterator[None]:
    """Turn off dropout and the gradients of parameters; restore both afterwards."""
    learning = [one for one in model.parameters() if one.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        with evaluating(model):
            yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _make_table(
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
