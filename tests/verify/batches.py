"""Batches as the data module and users give them."""

from __future__ import annotations

import torch

from tests.families import tokens


def padded(side: str = "right", rows: int = 3, length: int = 12) -> dict[str, torch.Tensor]:
    """Rows of different lengths; row 0 is whole."""
    mask = torch.ones(rows, length, dtype=torch.long)
    for row in range(1, rows):
        blank = slice(length - 3 * row, length) if side == "right" else slice(0, 3 * row)
        mask[row, blank] = 0
    ids = tokens(rows, length) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def packed(rows: int = 2, length: int = 12) -> dict[str, torch.Tensor]:
    """Two documents per row, told apart by positions that start again."""
    positions = torch.cat([torch.arange(length // 3), torch.arange(length - length // 3)])
    ids = tokens(rows, length)
    return {"input_ids": ids, "position_ids": positions.expand(rows, -1), "labels": ids}
