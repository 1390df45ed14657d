"""The order of training windows. It follows from the seed alone, so that training can resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler


class ResumableSampler(Sampler[list[int]]):
    """Batches of window numbers; the n-th batch of a run is a function of n and the seed.

    Every epoch is a new permutation, divided evenly between the ranks. Windows that do not fill a
    batch are left out of that epoch. An iterator starts at the batch that training has reached
    and yields as many batches as an epoch has, so it does not matter how Lightning counts epochs
    when it resumes.

    Args:
        size: number of windows.
        batch_size: windows in one batch of one rank.
        seed: with the epoch, decides the permutation.
        rank, world: number of this process, and how many there are.
        trained: returns the number of batches that this rank has trained on; called at the start
            of each iterator.
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

    def order_windows(self, epoch: int) -> list[int]:
        """Return this rank's windows of one epoch, in order."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(self.size, generator=generator).tolist()
        return order[: self.size // self.world * self.world][self.rank :: self.world]

    def __iter__(self) -> Iterator[list[int]]:
        first = self._trained()
        order: tuple[int, list[int]] = (-1, [])
        for number in range(first, first + len(self)):
            epoch, batch = divmod(number, len(self))
            if order[0] != epoch:
                order = (epoch, self.order_windows(epoch))
            start = batch * self.batch_size
            yield order[1][start : start + self.batch_size]
