"""Attention sinks: few positions whose stream is many times larger, and on which others rely.

Most heads that have nothing to say attend to them (Xiao et al. 2023, arXiv:2309.17453; Sun et al.
2024, arXiv:2402.17762). Below the layer that makes such a position large, nothing shows it yet, and
one position of hundreds counts for little in least squares. But if its stream is not what it was,
it does not become large, and all that is after it is predicted far worse.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from surgery.calibration.folds import find_real_positions
from surgery.calibration.view import run_until
from surgery.console import track_progress
from surgery.data.collate import Batch
from surgery.models.stack import Stack, get_hidden

# A sink's stream, after some layer, is so many times the median over the positions of its batch.
HUGE = 10.0
# What all sinks count together, relative to all other positions.
SHARE = 1 / 8


@torch.no_grad()
def weigh_positions(
    model: PreTrainedModel, stack: Stack, batches: Sequence[Batch]
) -> list[torch.Tensor]:
    """Weigh the positions [B, N] of every batch: 1, or more for attention sinks.

    One pass over the batches. Empty: there are no sinks, or so many that they count enough.
    """
    found = []
    with track_progress("attention sinks", len(batches)) as steps:
        for batch in batches:
            found.append(_find_sinks(model, stack, batch))
            steps.advance()
    sinks = sum(int(mask.sum()) for mask in found)
    others = sum(mask.numel() for mask in found) - sinks
    if not sinks or SHARE * others <= sinks:
        return []
    return [torch.where(mask, SHARE * others / sinks, 1.0) for mask in found]


def _find_sinks(model: PreTrainedModel, stack: Stack, batch: Batch) -> torch.Tensor:
    real = find_real_positions(model, batch)
    ratios: list[torch.Tensor] = []

    def compare(_: nn.Module, args: Any, output: Any) -> None:
        size = get_hidden(output).float().square().mean(-1).sqrt()
        counted = size
        if real is not None and real.shape == size.shape:
            mask = real.to(size.device).bool()
            counted, size = size[mask], size.where(mask, 0)
        ratios.append(size / counted.median().clamp_min(torch.finfo(size.dtype).tiny))

    with ExitStack() as hooks:
        for layer in stack.layers:
            hooks.callback(layer.register_forward_hook(compare).remove)
        run_until(model, batch, stack.layers[-1])
    largest = ratios[0]
    for ratio in ratios[1:]:
        largest = largest.maximum(ratio.to(largest.device))
    return largest.cpu() > HUGE
