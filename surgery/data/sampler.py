"""The order of training windows, known from the seed alone, so that it can be resumed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class ResumableSampler(Sampler[int]):
    """A fresh permutation per epoch, split between ranks, started anywhere.

    Args:
        size: number of windows.
        seed: with the epoch, decides the permutation.
        rank, world: this process's share; every rank gets equally many (the rest is dropped).
        start: windows of this rank already seen in epoch `epoch`.
    """

    def __init__(
        self, size: int, seed: int, *, rank: int = 0, world: int = 1, epoch: int = 0, start: int = 0
    ) -> None:
        self.size = size
        self.seed = seed
        self.rank = rank
        self.world = world
        self.epoch = epoch
        self._start = {epoch: start}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size // self.world

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.size, generator=generator)
        mine = order[: len(self) * self.world][self.rank :: self.world]
        return iter(mine[self._start.get(self.epoch, 0) :].tolist())
