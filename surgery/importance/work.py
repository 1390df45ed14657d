"""What an estimator is given, and what it gives back for every batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from surgery.config.schema import ObjectiveName, Task
from surgery.importance.table import GROUPS, HEADS
from surgery.models.forward import no_cache
from surgery.models.sites import Site

Batch = Mapping[str, torch.Tensor]
# Unit → for each site, one number per head or group.
Scores = dict[str, list[torch.Tensor]]


@dataclass(frozen=True)
class Work:
    """One scoring: whose heads, by which loss.

    Attributes:
        units: of ``heads`` and ``groups``, those asked for.
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
    """Of one batch.

    Attributes:
        scores: see `Scores`.
        weight: what it counts for beside other batches: its judged positions, or its examples.
        tokens: positions that were looked at.
        loss: label loss of the model as it is, in nats per token; ``None``: not measured.
    """

    scores: Scores
    weight: int
    tokens: int
    loss: float | None = None


class Ablation(NamedTuple):
    """Heads that are taken away together: one, or a KV head's.

    Attributes:
        site: number among the sites.
        heads: query heads.
        units: (unit, index) of every score that this ablation is.
    """

    site: int
    heads: tuple[int, ...]
    units: tuple[tuple[str, int], ...]


def ablations(sites: Sequence[Site], units: Sequence[str]) -> list[Ablation]:
    """What has to be taken away for scores of `units`, nothing twice: site after site."""
    found = []
    for number, site in enumerate(sites):
        cuts: dict[tuple[int, ...], list[tuple[str, int]]] = {}
        if HEADS in units:
            for head in range(site.q_heads):
                cuts.setdefault((head,), []).append((HEADS, head))
        if GROUPS in units:
            size = site.group_size
            for group in range(site.kv_heads):
                heads = tuple(range(group * size, (group + 1) * size))
                cuts.setdefault(heads, []).append((GROUPS, group))
        found += [Ablation(number, heads, tuple(names)) for heads, names in cuts.items()]
    return found


def empty_scores(sites: Sequence[Site], units: Sequence[str]) -> Scores:
    """Zeros, fp64, on the CPU."""
    sizes = {HEADS: [site.q_heads for site in sites], GROUPS: [site.kv_heads for site in sites]}
    return {
        unit: [torch.zeros(size, dtype=torch.float64) for size in sizes[unit]] for unit in units
    }


def logits_of(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """[B, N, V] or [B, C] of a batch, whose labels are not handed over."""
    inputs: dict[str, Any] = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs, **no_cache(model)).logits
    assert isinstance(logits, torch.Tensor)
    return logits
