"""How far tasks agree on their heads: rank correlation, and heads that one alone needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from surgery.importance.table import ScoreTable, SiteScores

# Layer → query heads that a task's mask drops.
Mask = Mapping[int, Sequence[int]]


def ranks(values: Sequence[float]) -> np.ndarray:
    """[n] ranks from 1; equal values share the mean of theirs."""
    _, where, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[where], dtype=float)


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Pearson's correlation of the ranks (Spearman 1904), in [-1, 1].

    ``None`` where either has a single value: there is no order to agree with.
    """
    a, b = (ranks(values) - (len(values) + 1) / 2 for values in (first, second))
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(np.clip((a @ b) / norm, -1.0, 1.0)) if norm > 0 else None


def scored(table: ScoreTable) -> tuple[SiteScores, ...]:
    """The scores of query heads; of KV groups, where only these were measured."""
    return table.heads if table.heads is not None else table.get_scores("groups")


def correlations(tables: Mapping[str, ScoreTable]) -> list[list[float | None]]:
    """[tasks, tasks]: `spearman` between the scores of all heads (see `scored`)."""
    scores = [[s for site in scored(table) for s in site.scores] for table in tables.values()]
    return [[spearman(mine, other) for other in scores] for mine in scores]


def needed_by_one(
    masks: Mapping[str, Mask], heads: Mapping[int, int]
) -> dict[str, list[list[int]]]:
    """Task → [layer, head] of each head that its mask keeps and every other task's drops.

    Args:
        heads: layer → how many query heads it has.
    """
    everything = {(layer, head) for layer, count in heads.items() for head in range(count)}
    dropped = {
        name: {(layer, head) for layer, going in mask.items() for head in going}
        for name, mask in masks.items()
    }
    found = {}
    for name in masks:
        others = [gone for other, gone in dropped.items() if other != name]
        found[name] = sorted(map(list, set.intersection(*others, everything) - dropped[name]))
    return found
