"""Choose a ridge on text that the solution was not fitted to, from normal equations alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from surgery.calibration.output_moments import OutputMoments, compute_unit, sum_moments

# From hardly any to so much that next to nothing changes.
RIDGES = tuple(10 ** (quarter / 4) for quarter in range(-20, 13))


class Choice(NamedTuple):
    """A ridge, and what its solution leaves of the error on text that it was not fitted to.

    Attributes:
        ridge: relative to the mean second moment of the inputs.
        left: sum of squares of the error on held-out text, as a share of what it was before.
    """

    ridge: float
    left: float


@torch.no_grad()
def choose_ridge(folds: Sequence[OutputMoments], ridges: Sequence[float], *, bias: bool) -> Choice:
    """Choose the ridge by cross-validation over folds (Hastie, Tibshirani & Friedman, The Elements
    of Statistical Learning, sections 3.4.1 and 7.10).

    Each fold is held out once. On the others, ridge least squares towards no change is solved for
    all ridges by one eigendecomposition; its error on the fold is a quadratic form in the fold's
    own normal equations.

    Args:
        folds: moments of the changes that are wanted.
        bias: whether a bias is fitted too.
    """
    like = _move(folds[0].size)
    sizes = torch.tensor(ridges, dtype=like.dtype, device=like.device)
    total = sum_moments(folds)
    before = float(total.size)
    if not before > 0:
        return Choice(max(ridges), 1.0)
    gains = torch.stack([_compute_gain(total, fold, sizes, bias) for fold in folds])
    left = (before + gains.sum(0)).nan_to_num(math.inf)
    best = int(left.argmin())
    # Of ridges that are as good within the noise of the folds, the largest: it changes least.
    over = gains - gains[:, best, None]
    noise = (over - over.mean(0)).square().sum(0).mul(len(folds) / max(1, len(folds) - 1)).sqrt()
    alike = (over.sum(0) <= noise) & (sizes >= ridges[best]) & left.isfinite()
    chosen = max([best, *alike.nonzero().flatten().tolist()], key=lambda place: ridges[place])
    return Choice(ridges[chosen], float(left[chosen]) / before)


def _compute_gain(
    total: OutputMoments, held: OutputMoments, ridges: torch.Tensor, bias: bool
) -> torch.Tensor:
    """Compute |y - W u|² - |y|² on held-out text, for the solutions of all ridges on the rest."""
    square, across = map(_move, total.get_equations(bias=bias))
    held_square, held_across = map(_move, held.get_equations(bias=bias))
    square, across = square - held_square, across - held_across
    if total.rows == held.rows:  # nothing else to fit
        return torch.zeros_like(ridges)
    values, vectors = torch.linalg.eigh(square)
    # In this basis every solution is `across` divided, row by row.
    across, held_across = vectors.mT @ across, vectors.mT @ held_across
    both = (across * held_across).sum(1)
    pairs = (across @ across.mT) * (vectors.mT @ held_square @ vectors)
    # Without a ridge, directions that the text does not span would be divided by nothing.
    least = torch.finfo(values.dtype).eps * values[-1].clamp_min(1e-30)
    powers = values.clamp_min(0) + ridges[:, None] * compute_unit(square, bias=bias)
    shrunk = 1 / powers.clamp_min(float(least))
    return torch.einsum("ri,ij,rj->r", shrunk, pairs, shrunk) - 2 * shrunk @ both


def _move(tensor: torch.Tensor) -> torch.Tensor:
    """Move a tensor to where symmetric matrices can be decomposed: MPS cannot."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor
