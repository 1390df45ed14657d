"""The store of this grid's cells."""

from __future__ import annotations

from pathlib import Path

from benchmarks.merge_quality.grid import Cell
from benchmarks.shared import store


class Store(store.Store):
    """See `benchmarks.shared.store`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, lambda record: Cell.of(record).key)
