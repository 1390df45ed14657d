"""Batches of a streamed data set, in epochs, that can start at any batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import datasets

from surgery.data.collate import Batch
from surgery.data.sources import reading


class StreamBatches:
    """One iterator per epoch. Each epoch is shuffled again and starts where training stands.

    The length of an epoch is known only when it ends, so this notes at which batch each epoch
    began. To start in the middle of an epoch, it reads the beginning of the epoch again.

    Args:
        rows: the shuffled stream.
        loader: batches of `rows`.
        trained: returns the number of batches that this rank has trained on; called at the start
            of each iterator.
        epoch, began: an epoch, and the number of batches of the run before it.
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        loader: Iterable[Batch],
        *,
        trained: Callable[[], int],
        epoch: int = 0,
        began: int = 0,
    ) -> None:
        self._rows = rows
        self._loader = loader
        self._trained = trained
        self._began = {epoch: began}

    def find_epoch(self, trained: int) -> tuple[int, int]:
        """Find the epoch of batch number `trained`, and the number of its first batch."""
        return max((epoch, began) for epoch, began in self._began.items() if began <= trained)

    def __iter__(self) -> Iterator[Batch]:
        trained = self._trained()
        epoch, began = self.find_epoch(trained)
        number = began
        while True:
            self._rows.set_epoch(epoch)
            with reading("data.path"):
                for batch in self._loader:
                    number += 1
                    if number > trained:
                        yield batch
            epoch += 1
            if number > trained or number == began:
                self._began[epoch] = number
                return
            # The checkpoint was written after an epoch's last batch.
            began = self._began[epoch] = number
