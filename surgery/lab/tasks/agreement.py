"""Measure how far tasks agree on heads: rank correlation, and heads that only one task needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from surgery.importance.table import ScoreTable, SiteScores

# Layer → query heads that a task's mask drops.
Mask = Mapping[int, Sequence[int]]


def rank_values(values: Sequence[float]) -> np.ndarray:
    """Rank values from 1: [n]; equal values get the mean of their ranks."""
    _, where, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[where], dtype=float)


def compute_spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Compute Pearson's correlation of the ranks (Spearman 1904), in [-1, 1].

    ``None`` if all values of one side are equal, so that they have no order.
    """
    a, b = (rank_values(values) - (len(values) + 1) / 2 for values in (first, second))
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(np.clip((a @ b) / norm, -1.0, 1.0)) if norm > 0 else None


def get_head_scores(table: ScoreTable) -> tuple[SiteScores, ...]:
    """Return the scores of query heads, or of KV groups if only these were measured."""
    return table.heads if table.heads is not None else table.get_scores("groups")


def correlate_tasks(tables: Mapping[str, ScoreTable]) -> list[list[float | None]]:
    """Compute the rank correlation between the head scores of all tasks: [tasks, tasks]."""
    scores = [
        [s for site in get_head_scores(table) for s in site.scores] for table in tables.values()
    ]
    return [[compute_spearman(mine, other) for other in scores] for mine in scores]


def find_needed_by_one(
    masks: Mapping[str, Mask], heads: Mapping[int, int]
) -> dict[str, list[list[int]]]:
    """Find the heads that only one task needs: its mask keeps them, all other masks drop them.

    Args:
        heads: layer → number of query heads.

    Returns:
        Task → [layer, head] of each such head.
    """
    everything = {(layer, head) for layer, count in heads.items() for head in range(count)}
    dropped = {
        name: {(layer, head) for layer, heads_of_layer in mask.items() for head in heads_of_layer}
        for name, mask in masks.items()
    }
    needed = {}
    for name in masks:
        others = [of_other for other, of_other in dropped.items() if other != name]
        needed[name] = sorted(map(list, set.intersection(*others, everything) - dropped[name]))
    return needed
