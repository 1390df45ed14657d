"""Heads turned towards each other before they are averaged (arXiv:2412.20677)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from surgery.operations.gqa.keys import KeyMoments, SharedKeys

ROUNDS = 20


@dataclass(frozen=True)
class AlignedValues:
    """The mean of values that were turned towards each other.

    Attributes:
        value: [D, members * D]: the mean of the turned values.
        turns: per member [D, D] orthogonal: what its values were turned by; its heads' output
            projections are multiplied by the transpose.
    """

    value: torch.Tensor
    turns: list[torch.Tensor]


def align_keys(moments: KeyMoments, group: Sequence[int]) -> SharedKeys:
    """Turn each member towards the group's mean, plane by plane, then average.

    Only turns that commute with RoPE: the angle of Σ k_mean conj(k) in every rotated plane; an
    orthogonal Procrustes turn of the free features. Iterated, since turning moves the mean.
    """
    layout, members = moments.layout, list(group)
    count, width = len(members), len(layout.free)
    gram = moments.planes[:, members][:, :, members]
    turns = gram.new_ones(gram.shape[0], count)
    for _ in range(ROUNDS if layout.pairs else 0):
        # E[k_mean conj(k_m)], k_mean = Σ turns k / count
        across = torch.einsum("pg,pgm->pm", turns, gram)
        turns = torch.polar(torch.ones_like(across.real), across.angle())
    rows = torch.cat([torch.arange(m * width, (m + 1) * width) for m in members])
    free = solve_procrustes(moments.free[rows][:, rows], count) if width else []
    shared = torch.cat(free, dim=1) / count if width else moments.free.new_zeros(0, 0)
    queries = []
    for number in range(count):
        # q' = turn q, as k' = turn k: their product stays.
        own = free[number] if width else shared
        queries.append(layout.to_dense(turns[:, number : number + 1], own))
    return SharedKeys(layout.to_dense(turns / count, shared), queries, 0.0)


def align_values(covariance: torch.Tensor, members: int) -> AlignedValues:
    """Turn each member's values orthogonally towards the group's mean, then average.

    Args:
        covariance: [members * D, members * D], second moments of the stacked values.
    """
    turns = solve_procrustes(covariance, members)
    return AlignedValues(torch.cat(turns, dim=1) / members, turns)


def solve_procrustes(covariance: torch.Tensor, members: int) -> list[torch.Tensor]:
    """Find orthogonal A_m that bring every A_m f_m nearest to their mean (alternating).

    Args:
        covariance: [members * n, members * n] of the stacked features f.
    """
    size = len(covariance) // members
    blocks = covariance.view(members, size, members, size).permute(0, 2, 1, 3)
    turns = [torch.eye(size, dtype=covariance.dtype, device=covariance.device)] * members
    for _ in range(ROUNDS):
        for one in range(members):
            # E[mean f^T], the mean without its own part, which would hold it where it is.
            across = sum(
                (turns[other] @ blocks[other, one] for other in range(members) if other != one),
                torch.zeros_like(turns[one]),
            )
            left, _, right = torch.linalg.svd(across)
            turns[one] = left @ right
    return turns


def compute_renorm_factor(merged: torch.Tensor, sources: Sequence[torch.Tensor]) -> torch.Tensor:
    """Compute how much pooling shrank a head: mean norm of the sources over the pooled one."""
    size = torch.stack([source.norm() for source in sources]).mean()
    return size / merged.norm().clamp_min(1e-30)
