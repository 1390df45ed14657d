"""Families of heads, redundancy of heads, and groups of KV heads that could be shared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from surgery.calibration.grouping import partition
from surgery.importance.table import ScoreTable, SiteScores
from surgery.lab.analysis.similarity import Similarity, compute_cosines
from surgery.models.sites import Site


def build_tree(divergence: torch.Tensor) -> np.ndarray:
    """Build scipy's linkage matrix [T - 1, 4]: average linkage on divergences [T, T]."""
    distances = squareform(divergence.numpy(), checks=False)
    return np.asarray(linkage(distances, method="average", optimal_ordering=len(divergence) <= 256))


def find_clusters(links: np.ndarray, distance: float) -> list[int]:
    """Find the number of each head's cluster, from 0 in the order of first members.

    Two clusters are merged if their heads diverge by at most `distance` bits on average.
    """
    labels = fcluster(links, distance, criterion="distance").tolist()
    numbers: dict[int, int] = {}
    return [numbers.setdefault(label, len(numbers)) for label in labels]


def find_nearest(divergence: torch.Tensor) -> list[int]:
    """Find for each head the other head whose attention rows diverge least."""
    others = divergence + torch.diag(torch.full((len(divergence),), torch.inf))
    return others.argmin(1).tolist()


def compute_redundancy(gram: torch.Tensor) -> torch.Tensor:
    """Compute how much of each head's output is a weighted sum of the others' outputs: [H].

    This is the squared multiple correlation R2 = g^T G^-1 g / ||h||^2 (uncentred). G [H - 1, H - 1]
    holds inner products of the other heads, g those with the head. Each other head has one weight,
    so R2 is the part that the others could replace if only their sizes change. It is 1 for a head
    that adds nothing.

    Args:
        gram: [H, H], inner products of the heads of one layer.
    """
    redundancy = torch.ones(len(gram), dtype=torch.float64)
    cosine = compute_cosines(gram).double()
    for head in range(len(gram)):
        if gram[head, head] <= 0:
            continue
        others = [other for other in range(len(gram)) if other != head]
        with_head = cosine[others, head]
        inverse = torch.linalg.pinv(cosine[others][:, others], hermitian=True)
        redundancy[head] = (with_head @ inverse @ with_head).clamp(0, 1)
    return redundancy


def compute_redundancies(similarity: Similarity) -> torch.Tensor:
    """Compute the redundancy of all heads [T], each within its layer."""
    layers = torch.tensor([layer for layer, _ in similarity.heads])
    redundancies = torch.zeros(len(layers), dtype=torch.float64)
    for layer in layers.unique():
        here = layers == layer
        redundancies[here] = compute_redundancy(similarity.gram[here][:, here])
    return redundancies


def score_redundancy(
    similarity: Similarity, sites: list[Site], *, model: str, data: str, batches: int, seed: int
) -> ScoreTable:
    """Score heads by what they add and the others of their layer cannot replace.

    The score is the root mean square over positions of ||W_O,h o_h|| sqrt(1 - redundancy), in
    units of the residual stream. It is low for heads that are small, redundant, or both.
    """
    own = 1 - compute_redundancies(similarity)
    scores = (similarity.gram.diagonal().clamp(min=0) * own).sqrt().tolist()
    rows: dict[int, list[float]] = {}
    for (layer, _), score in zip(similarity.heads, scores, strict=True):
        rows.setdefault(layer, []).append(score)
    return ScoreTable(
        estimator="redundancy",
        objective="lm",
        groups=None,
        unit_of_scores="norm",
        heads=tuple(
            SiteScores(
                site.layer, site.path, tuple(rows[site.layer]), (float("nan"),) * site.q_heads
            )
            for site in sites
        ),
        model=model,
        data=data,
        batches=batches,
        tokens=similarity.rows,
        seed=seed,
    )


def find_shared_groups(similarity: Similarity, sites: Sequence[Site]) -> dict[str, dict[str, Any]]:
    """Find groups of KV heads whose query heads attend alike, for operations that merge them.

    There is an entry for every number of KV heads that divides the KV heads of all `sites`, except
    one and all of them. Groups have equal size and the lowest sum of pair divergences. The
    divergence of two KV heads is the mean over the pairs of query heads that read them.

    Returns:
        Number of KV heads → layer → groups.
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
        str(count): {str(layer): _partition_heads(cost, count) for layer, cost in costs.items()}
        for count in counts
    }


def _partition_heads(cost: torch.Tensor, count: int) -> list[list[int]]:
    return [list(group) for group in partition(cost, count)]
