"""Which positions of the calibration text are held out together, so that text judges other text."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from surgery.data.collate import Batch

FOLDS = 4


class Folds:
    """A fold for every position of every batch.

    Equal windows share a fold, so that none is judged by itself. Text that is one window, alone or
    repeated, is cut into halves: its first positions and its last.

    Attributes:
        count: number of folds.
        halves: whether positions are told apart, not windows.
    """

    def __init__(self, batches: Sequence[Batch], count: int = FOLDS) -> None:
        known: dict[tuple[bytes, ...], int] = {}
        self._rows = [
            [known.setdefault(window, len(known)) for window in _list_windows(batch)]
            for batch in batches
        ]
        self.halves = len(known) < 2
        self.count = 2 if self.halves else min(count, len(known))

    def get(self, number: int, length: int) -> torch.Tensor:
        """Get the folds [B, length] of a batch."""
        windows = torch.tensor(self._rows[number])[:, None]
        if not self.halves:
            return (windows % self.count).expand(-1, length)
        return cut_in_halves(len(windows), length)

    def hold_out(self, batches: int) -> list[int]:
        """Choose whole batches of the first `batches` to hold out, about one fold: the last ones.

        None, where their windows stand in others too: then one fold of each has to do.
        """
        held = max(1, batches // self.count)
        first, last = self._rows[: batches - held], self._rows[batches - held : batches]
        fits = first and not {n for rows in first for n in rows} & {
            n for rows in last for n in rows
        }
        return list(range(batches - held, batches)) if fits else []


def cut_in_halves(rows: int, length: int) -> torch.Tensor:
    """Give the first positions of every row the fold 0, and the last ones 1: [rows, length]."""
    return (torch.arange(length) >= length // 2).long().expand(rows, -1)


def _list_windows(batch: Batch) -> list[tuple[bytes, ...]]:
    tensors = [value.cpu() for name, value in batch.items() if name != "labels" and value.ndim]
    rows = len(tensors[0])
    return [tuple(_digest(t[row]) for t in tensors if len(t) == rows) for row in range(rows)]


def _digest(row: torch.Tensor) -> bytes:
    return row.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
