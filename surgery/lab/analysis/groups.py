"""Which KV heads could share: those whose query heads attend alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from surgery.calibration.grouping import partition
from surgery.lab.analysis.similarity import Similarity
from surgery.models.sites import Site


def shared_groups(similarity: Similarity, sites: Sequence[Site]) -> dict[str, dict[str, Any]]:
    """Number of KV heads → layer → groups, as operations that merge KV heads take them.

    For every number that divides the KV heads of all `sites`, one and all of them left out. Groups
    are of equal size, and those whose pairs diverge least in sum; two KV heads diverge by the mean
    over the query heads that read the one and the other.
    """
    costs, start = {}, 0
    for site in sites:
        own = slice(start, start + site.q_heads)
        start += site.q_heads
        table = similarity.divergence[own, own]
        shape = (site.kv_heads, site.group_size, site.kv_heads, site.group_size)
        costs[site.layer] = table.reshape(shape).mean((1, 3))
    most = min(site.kv_heads for site in sites)
    counts = [
        n
        for n in range(2, most + 1)
        if all(site.kv_heads % n == 0 and site.kv_heads > n for site in sites)
    ]
    return {
        str(count): {str(layer): _lists(cost, count) for layer, cost in costs.items()}
        for count in counts
    }


def _lists(cost: torch.Tensor, count: int) -> list[list[int]]:
    return [list(group) for group in partition(cost, count)]
