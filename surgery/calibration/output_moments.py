"""Normal equations of an output projection: what a least-squares fit needs of any text."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Outputs that are solved at once; a copy of all would be the largest tensor of a merge.
BLOCK = 512


class OutputMoments:
    """Running normal equations of y ≈ W u (+ b): [N+1, N+1] and [N+1, D], bounded by the widths.

    Attributes:
        square: Σ u u^T, with a 1 after each u.
        across: Σ u y^T.
        size: Σ |y|².
        rows: how many.

    Args:
        inputs: N, width of the output projection's input.
        outputs: D.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.square = torch.zeros(inputs + 1, inputs + 1, dtype=dtype, device=device)
        self.across = torch.zeros(inputs + 1, outputs, dtype=dtype, device=device)
        self.size = torch.zeros((), dtype=dtype, device=device)
        self.rows = 0

    def add(
        self, inputs: torch.Tensor, targets: torch.Tensor, scale: torch.Tensor | None = None
    ) -> None:
        """Add rows: inputs [R, N], targets [R, D], and by what each row is multiplied, [R]."""
        wide = torch.cat([inputs.float(), torch.ones_like(inputs[:, :1]).float()], dim=1)
        if scale is not None:
            wide, targets = wide * scale[:, None].float(), targets * scale[:, None]
        self.square += wide.mT @ wide
        self.across += wide.mT @ targets.float()
        self.size += targets.to(self.size.dtype).square().sum()
        self.rows += len(inputs)

    def drop(self, columns: torch.Tensor, weight: torch.Tensor) -> OutputMoments:
        """Make the moments of the other inputs, which are to make up for these too.

        Args:
            columns: of the inputs, that go.
            weight: [D, N], by which all inputs were multiplied until now.
        """
        inputs, outputs = len(self.square) - 1, self.across.shape[1]
        kept = torch.ones(inputs + 1, dtype=torch.bool, device=self.square.device)
        kept[columns] = False
        gone = weight[:, columns].to(self.square.dtype)
        rows = self.square[:, columns]
        found = OutputMoments(inputs - len(columns), outputs, self.square.device)
        found.square = self.square[kept][:, kept]
        found.across = self.across[kept] + rows[kept] @ gone.mT
        found.size = self.size + 2 * (self.across[columns] * gone.mT).sum()
        found.size = found.size + ((gone @ rows[columns]) * gone).sum()
        found.rows = self.rows
        return found

    def get_equations(self, *, bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Get `square` and `across`, without the last row where there is no bias."""
        return (self.square, self.across) if bias else (self.square[:-1, :-1], self.across[:-1])

    def solve(
        self, weight: torch.Tensor, bias: torch.Tensor | None, ridge: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Solve ridge least squares towards the present weight [D, N] and bias [D] (or none).

        Args:
            ridge: relative to the mean second moment of the inputs.
        """
        square, across = self.get_equations(bias=bias is not None)
        now = weight
        if bias is not None:
            now = torch.cat([now, bias.to(now.dtype)[:, None]], dim=1)
        size = compute_unit(square, bias=bias is not None)
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


def compute_unit(square: torch.Tensor, *, bias: bool) -> torch.Tensor:
    """Compute the mean second moment of the inputs: ridges are relative to it."""
    powers = square.diagonal()
    return (powers[:-1] if bias else powers).mean().clamp_min(1e-30)


def sum_moments(parts: Sequence[OutputMoments]) -> OutputMoments:
    """Sum the moments of several parts of a text."""
    inputs, outputs = parts[0].across.shape
    total = OutputMoments(inputs - 1, outputs, parts[0].square.device)
    for part in parts:
        total.square += part.square
        total.across += part.across
        total.size += part.size
        total.rows += part.rows
    return total
