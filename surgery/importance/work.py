"""The input of an estimator, and its result for each batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from surgery.config.schema import ObjectiveName, Task
from surgery.data.collate import Batch
from surgery.errors import ConfigError
from surgery.importance.table import ESTIMATORS, GROUPS, HEADS
from surgery.models.packed import make_inputs
from surgery.models.sites import Site

# Unit → for each site, one number per head or group.
Scores = dict[str, list[torch.Tensor]]


@dataclass(frozen=True)
class Work:
    """What an estimator has to score, and by which loss.

    Attributes:
        units: ``heads``, ``groups`` or both.
        memory_rows: rows of a batch that may run side by side, ablations included.
    """

    model: PreTrainedModel
    sites: Sequence[Site]
    units: Sequence[str]
    task: Task
    objective: ObjectiveName
    seed: int
    memory_rows: int


class BatchScores(NamedTuple):
    """The scores on one batch.

    Attributes:
        weight: weight of this batch among others: its labelled positions, or its examples.
        tokens: number of positions that were used.
        loss: label loss of the unchanged model, in nats per token; ``None``: not measured.
    """

    scores: Scores
    weight: int
    tokens: int
    loss: float | None = None


class Ablation(NamedTuple):
    """Query heads that are removed together: a single one, or those of a KV head.

    Attributes:
        site: number of the site among the sites.
        heads: query heads.
        units: (unit, index) of every score that this ablation gives.
    """

    site: int
    heads: tuple[int, ...]
    units: tuple[tuple[str, int], ...]


def check_estimator(key: str, estimator: str, objective: ObjectiveName) -> None:
    """Check what can be checked before a model is loaded.

    Raises:
        ConfigError: the estimator is unknown, or cannot measure `objective`.
    """
    if estimator not in ESTIMATORS:
        raise ConfigError(key, "unknown estimator", given=estimator, valid=ESTIMATORS)
    if estimator == "gate_gradient" and objective is ObjectiveName.distill:
        raise ConfigError(
            "importance.objective",
            "the KL of a model to itself has no gradient: gate_gradient would be zero everywhere",
            given=objective.value,
            valid="lm, or estimator leave_one_out",
        )


def list_ablations(sites: Sequence[Site], units: Sequence[str]) -> list[Ablation]:
    """List the ablations that scores of `units` need, each once, site after site."""
    ablations = []
    for number, site in enumerate(sites):
        by_heads: dict[tuple[int, ...], list[tuple[str, int]]] = {}
        if HEADS in units:
            for head in range(site.q_heads):
                by_heads.setdefault((head,), []).append((HEADS, head))
        if GROUPS in units:
            size = site.group_size
            for group in range(site.kv_heads):
                heads = tuple(range(group * size, (group + 1) * size))
                by_heads.setdefault(heads, []).append((GROUPS, group))
        ablations += [Ablation(number, heads, tuple(names)) for heads, names in by_heads.items()]
    return ablations


def make_empty_scores(sites: Sequence[Site], units: Sequence[str]) -> Scores:
    """Make scores of zero, fp64, on the CPU."""
    sizes = {HEADS: [site.q_heads for site in sites], GROUPS: [site.kv_heads for site in sites]}
    return {
        unit: [torch.zeros(size, dtype=torch.float64) for size in sizes[unit]] for unit in units
    }


def compute_logits(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Run the model on a batch without its labels: logits [B, N, V] or [B, C]."""
    inputs: dict[str, Any] = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**make_inputs(model, inputs)).logits
    assert isinstance(logits, torch.Tensor)
    return logits
