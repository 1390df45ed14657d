"""A site's output projection solved anew, from what it is given to what the original put out."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from surgery.calibration.refit import OutputMoments
from surgery.calibration.rows import widest
from surgery.calibration.text import SiteText


class Solved(NamedTuple):
    """An output projection, [out, in], and what the site's output is off by.

    Attributes:
        weight: [D_model, columns], in at least fp32.
        bias: [D_model], where the projection has one.
        size: sum of squares of the original's output, over all real positions.
        before, after: sums of squares of what was missing of it, and of what still is.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    size: float
    before: float
    after: float


@torch.no_grad()
def solve_output(
    text: SiteText, ridge: float, advance: Callable[[], None], columns: torch.Tensor | None = None
) -> Solved:
    """Ridge least squares towards the original's output, on the stream of the layers below.

    Args:
        text: whose `work` computes what the site's other projections will.
        ridge: as a share of the inputs' mean second moment.
        advance: told of every batch that is done with.
        columns: features of the input that are left; ``None``: all.
    """
    work, output = text.work, text.site.output
    weight = work.get_parameter(f"{output.path}.weight")
    bias = getattr(work.get_submodule(output.path), "bias", None)
    now = weight.mT if output.transposed else weight
    if columns is not None:
        now = now[:, columns.to(weight.device)]
    wide = torch.promote_types(weight.dtype, torch.float32)
    moments = OutputMoments(now.shape[1], output.out_features, weight.device)
    size = before = 0.0
    for seen, target in text.targets():
        assert seen.inputs is not None
        inputs = seen.inputs
        if seen.real is not None:
            inputs, target = inputs[seen.real], target[seen.real]
        if columns is not None:
            inputs = inputs[..., columns.to(inputs.device)]
        inputs, target = inputs.to(wide).flatten(0, -2), target.to(wide).flatten(0, -2)
        # What is missing is far smaller than the whole, and so is what rounding does to it.
        missing = target - (inputs @ now.mT.to(wide) + (0 if bias is None else bias.to(wide)))
        moments.add(inputs, missing)
        size += float(widest(target).square().sum())
        before += float(widest(missing).square().sum())
        advance()
    nothing = now.new_zeros(now.shape, dtype=moments.square.dtype)
    made, made_bias = moments.solve(nothing, None if bias is None else nothing[:, 0], ridge)
    after = before - _explained(moments, made, made_bias)
    new_bias = None if bias is None or made_bias is None else widest(bias) + made_bias
    return Solved(widest(now) + made, new_bias, size, before, after)


def _explained(moments: OutputMoments, made: torch.Tensor, bias: torch.Tensor | None) -> float:
    """|y|² - |y - X u|², from the normal equations."""
    square, across = moments.square, moments.across
    if bias is None:
        square, across = square[:-1, :-1], across[:-1]
    else:
        made = torch.cat([made, bias[:, None]], dim=1)
    return float((made * (2 * across.mT - made @ square)).sum())
