"""Cells done in order, one at a time or side by side, until they or the time are at an end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from typing import Any

from benchmarks.merge_quality.grid import Cell
from benchmarks.merge_quality.store import Store
from surgery.console import say

Measure = Callable[[Cell], dict[str, Any]]


class RefusedError(Exception):
    """The model cannot be converted so."""


class DivergedError(RefusedError):
    """It can, and did not survive healing."""


def go(
    todo: Sequence[Cell],
    store: Store,
    measure: Measure,
    *,
    workers: int = 1,
    deadline: float = math.inf,
    again: bool = False,
) -> dict[str, str]:
    """Measure what the store lacks.

    Args:
        measure: a cell's record; for several workers it has to pickle.
        deadline: of `time.monotonic()`; no cell begins after it.
        again: measure what the store has, too.

    Returns:
        Reasons, by what was refused and not tried again.
    """
    crew = _Crew(store, again)
    if workers == 1:
        for cell in todo:
            if time.monotonic() < deadline and crew.wants(cell):
                crew.finish(cell, lambda cell=cell: measure(cell))  # type: ignore[misc]
        return crew.refused
    running: dict[Future[dict[str, Any]], Cell] = {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for cell in todo:
            while len(running) == workers:
                crew.collect(running)
            if time.monotonic() < deadline and crew.wants(cell):
                running[pool.submit(measure, cell)] = cell
        while running:
            crew.collect(running)
    return crew.refused


class _Crew:
    def __init__(self, store: Store, again: bool) -> None:
        self.store, self.again = store, again
        self.refused: dict[str, str] = {}

    def wants(self, cell: Cell) -> bool:
        # Read anew each time: another run may be at work on the same store.
        kept = not self.again and cell.key in self.store.cells()
        return not kept and _conversion(cell) not in self.refused

    def collect(self, running: dict[Future[dict[str, Any]], Cell]) -> None:
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            self.finish(running.pop(future), future.result)

    def finish(self, cell: Cell, result: Callable[[], dict[str, Any]]) -> None:
        try:
            record = result()
        except RefusedError as error:
            what = cell.key if isinstance(error, DivergedError) else _conversion(cell)
            if what not in self.refused:
                say(f"{what}: refused: {error}")
            self.refused[what] = str(error)
            return
        self.store.append("cell", record)
        seconds = sum(record["seconds"].values())
        say(f"{cell.key}: loss {record['loss']:.4f}, KL {record['kl']:.4f}, {seconds:.0f} s")


def _conversion(cell: Cell) -> str:
    return f"{cell.kind} {cell.merge} {cell.ratio}"
