"""Batches of a streamed data set, in epochs, started anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import datasets

from surgery.data.collate import Batch
from surgery.data.sources import reading


class StreamBatches:
    """One iterator per epoch, each epoch shuffled anew, taken up where training stands.

    How long an epoch is shows only when it ends, so this notes at which batch each one began.
    Going back to the middle of an epoch reads through its beginning.

    Args:
        rows: the shuffled stream.
        loader: batches of `rows`.
        trained: asked at the start of each iterator: batches this rank has been through.
        epoch, began: an epoch, and the number of the run's batches before it.
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

    def epoch_at(self, trained: int) -> tuple[int, int]:
        """The epoch in which batch number `trained` is, and the number of its first batch."""
        return max((epoch, began) for epoch, began in self._began.items() if began <= trained)

    def __iter__(self) -> Iterator[Batch]:
        trained = self._trained()
        epoch, began = self.epoch_at(trained)
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
