"""The order of training windows, known from the seed alone, so that it can be resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler


class ResumableSampler(Sampler[list[int]]):
    """Batches of window numbers; the n-th batch of a run is a function of n and the seed.

    Every epoch is a fresh permutation, shared out evenly between ranks. What does not fill a
    batch is left out of that epoch. An iterator takes up where training stands and yields one
    epoch's worth of batches, so it does not matter how Lightning counts epochs when it resumes.

    Args:
        size: number of windows.
        batch_size: windows in one batch of one rank.
        seed: with the epoch, decides the permutation.
        rank, world: this process's share.
        trained: asked at the start of each iterator: batches this rank has been through.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        world: int = 1,
        trained: Callable[[], int] = lambda: 0,
    ) -> None:
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world = world
        self._trained = trained

    def __len__(self) -> int:
        return self.size // self.world // self.batch_size

    def order(self, epoch: int) -> list[int]:
        """This rank's windows of one epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(self.size, generator=generator).tolist()
        return order[: self.size // self.world * self.world][self.rank :: self.world]

    def __iter__(self) -> Iterator[list[int]]:
        first = self._trained()
        order: tuple[int, list[int]] = (-1, [])
        for number in range(first, first + len(self)):
            epoch, batch = divmod(number, len(self))
            if order[0] != epoch:
                order = (epoch, self.order(epoch))
            start = batch * self.batch_size
            yield order[1][start : start + self.batch_size]
