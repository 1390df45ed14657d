"""Solve a site's output projection again, from its new inputs to the original output."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from surgery.calibration.folds import REPEATED
from surgery.calibration.output_moments import OutputMoments, sum_moments
from surgery.calibration.ridge import RIDGES, choose_ridge
from surgery.calibration.rows import widen
from surgery.calibration.site_batches import SiteBatches
from surgery.errors import SiteError


class SolvedOutput(NamedTuple):
    """An output projection, and the error of the site's output with it.

    Errors are root mean squares over real positions, as shares of the original output's.

    Attributes:
        weight: [D_model, columns], in at least fp32.
        bias: [D_model], if the projection has one.
        before: the error with the old projection.
        fitted: with the new one, on the text that it was fitted to.
        held_out: with projections that were fitted to other text, by cross-validation.
        ridge: that was used; ``None`` where the old projection stays.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    before: float
    fitted: float
    held_out: float
    ridge: float | None


@dataclass(frozen=True)
class OutputProblem:
    """Least squares towards what a site should put out.

    Attributes:
        weight: [D_model, columns], the present projection.
        bias: [D_model], if it has one.
        folds: per fold of the text, moments of what is missing with it.
        size: Σ |target|², each position multiplied by its scale.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    folds: list[OutputMoments]
    size: float


@torch.no_grad()
def pose_problem(
    batches: SiteBatches, advance: Callable[[], None], columns: torch.Tensor | None = None
) -> OutputProblem:
    """Sum what a solution needs of the text, with the new layers below.

    Args:
        batches: its `work` must already have the site's other new projections.
        advance: called after every batch.
        columns: features of the input that are kept; ``None``: all.

    Raises:
        SiteError: what it puts out, or should, is not all numbers.
    """
    work, output = batches.work, batches.site.output
    weight = work.get_parameter(f"{output.path}.weight")
    bias = getattr(work.get_submodule(output.path), "bias", None)
    now = weight.mT if output.transposed else weight
    if columns is not None:
        now = now[:, columns.to(weight.device)]
    wide = torch.promote_types(weight.dtype, torch.float32)
    folds = [
        OutputMoments(now.shape[1], output.out_features, weight.device)
        for _ in range(batches.folds.count)
    ]
    size = 0.0
    for number, (view, aim) in enumerate(batches.iterate_aims()):
        assert view.inputs is not None
        device = aim.target.device
        held = batches.folds.get(number, aim.target.shape[1]).to(device)
        chosen = held != REPEATED if view.real is None else view.real & (held != REPEATED)
        inputs, target = view.inputs[chosen].to(wide), aim.target[chosen].to(wide)
        if columns is not None:
            inputs = inputs[:, columns.to(device)]
        # The error is far smaller than the output, and so is the rounding of its sums.
        missing = target - (inputs @ now.mT.to(wide) + (0 if bias is None else bias.to(wide)))
        scale = aim.scale[chosen]
        for fold, moments in enumerate(folds):
            here = held[chosen] == fold
            moments.add(inputs[here], missing[here], scale[here])
        size += float(widen(target * scale[:, None]).square().sum())
        advance()
    if not math.isfinite(sum(float(moments.size) for moments in folds) + size):
        raise SiteError(batches.site.path, "its activations are not finite")
    return OutputProblem(now, bias, folds, size)


@torch.no_grad()
def solve_output(problem: OutputProblem, ridge: float | None) -> SolvedOutput:
    """Solve ridge least squares.

    Args:
        ridge: relative to the mean second moment of the inputs; ``None``: what is best on held-out
            text, or no change where nothing is better.
    """
    now, bias, size = problem.weight, problem.bias, problem.size
    moments = sum_moments(problem.folds)
    before = float(moments.size)

    def share(error: float) -> float:
        return math.sqrt(max(0.0, error) / size) if size else 0.0

    found = choose_ridge(
        problem.folds, RIDGES if ridge is None else (ridge,), bias=bias is not None
    )
    # Fewer rows than unknowns say nothing of most of them.
    if ridge is None and (not found.left < 1 or moments.rows < now.shape[1]):
        same = None if bias is None else widen(bias)
        left = share(before)
        return SolvedOutput(widen(now), same, left, left, left, None)
    nothing = now.new_zeros(now.shape, dtype=moments.square.dtype)
    change, bias_change = moments.solve(
        nothing, None if bias is None else nothing[:, 0], found.ridge
    )
    after = before - _compute_explained(moments, change, bias_change)
    new_bias = None if bias is None or bias_change is None else widen(bias) + bias_change
    held_out = share(before * found.left)
    return SolvedOutput(
        widen(now) + change, new_bias, share(before), share(after), held_out, found.ridge
    )


def _compute_explained(
    moments: OutputMoments, made: torch.Tensor, bias: torch.Tensor | None
) -> float:
    """Compute |y|² - |y - X u|² from the normal equations."""
    square, across = moments.get_equations(bias=bias is not None)
    if bias is not None:
        made = torch.cat([made, bias[:, None]], dim=1)
    return float((made * (2 * across.mT - made @ square)).sum())
