"""The output projection solved anew, once everything before it is what it will be."""

from __future__ import annotations

import torch

# Outputs solved for at once: copies of all would be the largest tensors of a merge.
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
        """Ridge least squares towards what is there: weight [D, N], bias [D] or none.

        Args:
            ridge: as a share of the mean of the inputs' second moments.
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
        if failed:  # no ridge, and inputs that span too little
            factor, pivots = torch.linalg.lu_factor(square)
        del square
        made = torch.empty_like(now)
        for at in range(0, len(now), BLOCK):
            part = slice(at, at + BLOCK)
            right = across[:, part] + ridge * size * now[part].mT
            if failed:
                found = torch.linalg.lu_solve(factor, pivots, right)
            else:
                found = torch.cholesky_solve(right, factor)
            made[part] = found.mT
        if bias is None:
            return made, None
        return made[:, :-1].contiguous(), made[:, -1].contiguous()
