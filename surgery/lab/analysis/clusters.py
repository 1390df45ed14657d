"""Families of heads, and how much of a head the others of its layer could say."""

from __future__ import annotations

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from surgery.importance.table import ScoreTable, SiteScores
from surgery.lab.analysis.similarity import Similarity, cosines
from surgery.models.sites import Site


def tree(divergence: torch.Tensor) -> np.ndarray:
    """scipy's linkage matrix [T - 1, 4]: average linkage on divergences [T, T]."""
    distances = squareform(divergence.numpy(), checks=False)
    return np.asarray(linkage(distances, method="average", optimal_ordering=len(divergence) <= 256))


def clusters(links: np.ndarray, distance: float) -> list[int]:
    """Number of each head's cluster, from 0 in the order of first members.

    Two clusters are one where heads of the one and of the other diverge by `distance` bits at most
    in the mean.
    """
    found = fcluster(links, distance, criterion="distance").tolist()
    numbers: dict[int, int] = {}
    return [numbers.setdefault(one, len(numbers)) for one in found]


def nearest(divergence: torch.Tensor) -> list[int]:
    """For each head, the other one whose attention rows diverge least."""
    others = divergence + torch.diag(torch.full((len(divergence),), torch.inf))
    return others.argmin(1).tolist()


def redundancy(gram: torch.Tensor) -> torch.Tensor:
    """[H], how much of each head's output is a weighted sum of the others' outputs.

    The squared multiple correlation R2 = g^T G^-1 g / ||h||^2 (uncentred): G [H - 1, H - 1] holds
    inner products of the others, g those with the head. One number weighs each other head, so it is
    what could be said by the others without changing any of them but its size. 1 for a head that
    adds nothing.

    Args:
        gram: [H, H], inner products of the heads of one layer.
    """
    found = torch.ones(len(gram), dtype=torch.float64)
    cosine = cosines(gram).double()
    for head in range(len(gram)):
        if gram[head, head] <= 0:
            continue
        others = [other for other in range(len(gram)) if other != head]
        with_head = cosine[others, head]
        inverse = torch.linalg.pinv(cosine[others][:, others], hermitian=True)
        found[head] = (with_head @ inverse @ with_head).clamp(0, 1)
    return found


def redundancies(similarity: Similarity) -> torch.Tensor:
    """[T], `redundancy` within each layer."""
    layers = torch.tensor([layer for layer, _ in similarity.heads])
    found = torch.zeros(len(layers), dtype=torch.float64)
    for layer in layers.unique():
        here = layers == layer
        found[here] = redundancy(similarity.gram[here][:, here])
    return found


def what_is_its_own(
    similarity: Similarity, sites: list[Site], *, model: str, data: str, batches: int, seed: int
) -> ScoreTable:
    """Score heads: root mean square of what a head adds and the others of its layer could not.

    ||W_O,h o_h|| sqrt(1 - redundancy), over positions; low for heads that are small, redundant, or
    both. In units of the residual stream.
    """
    own = 1 - redundancies(similarity)
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
