"""Solve a site's output projection again, from its new inputs to the original output."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from surgery.calibration.rows import widen
from surgery.calibration.site_batches import SiteBatches

# Outputs that are solved at once; a copy of all would be the largest tensor of a merge.
BLOCK = 512


class OutputMoments:
    """Running normal equations of y ≈ W u (+ b): [N+1, N+1] and [N+1, D], bounded by the widths.

    Args:
        inputs: N, width of the output projection's input.
        outputs: D.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.square = torch.zeros(inputs + 1, inputs + 1, dtype=dtype, device=device)
        self.across = torch.zeros(inputs + 1, outputs, dtype=dtype, device=device)

    def add(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Add rows: inputs [R, N], targets [R, D]."""
        wide = torch.cat([inputs.float(), torch.ones_like(inputs[:, :1]).float()], dim=1)
        self.square += wide.mT @ wide
        self.across += wide.mT @ targets.float()

    def solve(
        self, weight: torch.Tensor, bias: torch.Tensor | None, ridge: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Solve ridge least squares towards the present weight [D, N] and bias [D] (or none).

        Args:
            ridge: relative to the mean second moment of the inputs.
        """
        square, across = self.square, self.across
        now = weight
        if bias is None:
            square, across = square[:-1, :-1], across[:-1]
        else:
            now = torch.cat([now, bias.to(now.dtype)[:, None]], dim=1)
        size = square.diagonal()[: weight.shape[1]].mean().clamp_min(1e-30)
        square = square.clone()
        square.diagonal().add_(ridge * size)
        factor, failed = torch.linalg.cholesky_ex(square)
        if failed:  # without a ridge, if the inputs do not span all dimensions
            factor, pivots = torch.linalg.lu_factor(square)
        del square
        solution = torch.empty_like(now)
        for at in range(0, len(now), BLOCK):
            part = slice(at, at + BLOCK)
            right = across[:, part] + ridge * size * now[part].mT
            if failed:
                columns = torch.linalg.lu_solve(factor, pivots, right)
            else:
                columns = torch.cholesky_solve(right, factor)
            solution[part] = columns.mT
        if bias is None:
            return solution, None
        return solution[:, :-1].contiguous(), solution[:, -1].contiguous()


class SolvedOutput(NamedTuple):
    """An output projection, and the error of the site's output with it.

    Attributes:
        weight: [D_model, columns], in at least fp32.
        bias: [D_model], if the projection has one.
        size: sum of squares of the original output, over all real positions.
        before, after: sums of squares of the error with the old and the new projection.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    size: float
    before: float
    after: float


@torch.no_grad()
def solve_output(
    batches: SiteBatches,
    ridge: float,
    advance: Callable[[], None],
    columns: torch.Tensor | None = None,
) -> SolvedOutput:
    """Solve ridge least squares towards the original output, with the new layers below.

    Args:
        batches: its `work` must already have the site's other new projections.
        ridge: relative to the mean second moment of the inputs.
        advance: called after every batch.
        columns: features of the input that are kept; ``None``: all.
    """
    work, output = batches.work, batches.site.output
    weight = work.get_parameter(f"{output.path}.weight")
    bias = getattr(work.get_submodule(output.path), "bias", None)
    now = weight.mT if output.transposed else weight
    if columns is not None:
        now = now[:, columns.to(weight.device)]
    wide = torch.promote_types(weight.dtype, torch.float32)
    moments = OutputMoments(now.shape[1], output.out_features, weight.device)
    size = before = 0.0
    for view, target in batches.iterate_targets():
        assert view.inputs is not None
        inputs = view.inputs
        if view.real is not None:
            inputs, target = inputs[view.real], target[view.real]
        if columns is not None:
            inputs = inputs[..., columns.to(inputs.device)]
        inputs, target = inputs.to(wide).flatten(0, -2), target.to(wide).flatten(0, -2)
        # The error is far smaller than the output, and so is the rounding of its sums.
        missing = target - (inputs @ now.mT.to(wide) + (0 if bias is None else bias.to(wide)))
        moments.add(inputs, missing)
        size += float(widen(target).square().sum())
        before += float(widen(missing).square().sum())
        advance()
    nothing = now.new_zeros(now.shape, dtype=moments.square.dtype)
    change, bias_change = moments.solve(nothing, None if bias is None else nothing[:, 0], ridge)
    after = before - _compute_explained(moments, change, bias_change)
    new_bias = None if bias is None or bias_change is None else widen(bias) + bias_change
    return SolvedOutput(widen(now) + change, new_bias, size, before, after)


def _compute_explained(
    moments: OutputMoments, made: torch.Tensor, bias: torch.Tensor | None
) -> float:
    """Compute |y|² - |y - X u|² from the normal equations."""
    square, across = moments.square, moments.across
    if bias is None:
        square, across = square[:-1, :-1], across[:-1]
    else:
        made = torch.cat([made, bias[:, None]], dim=1)
    return float((made * (2 * across.mT - made @ square)).sum())
