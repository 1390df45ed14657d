"""Cells done in order, one at a time or side by side, until they or the time are at an end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any, Generic, Protocol, TypeVar

from benchmarks.shared.store import Store
from surgery.console import say


class Keyed(Protocol):
    """A cell."""

    @property
    def key(self) -> str: ...


C = TypeVar("C", bound=Keyed)
Record = dict[str, Any]


class RefusedError(Exception):
    """The model cannot be changed so."""


class DivergedError(RefusedError):
    """It can, and did not survive healing."""


def go(
    todo: Sequence[C],
    store: Store,
    measure: Callable[[C], Record],
    *,
    change: Callable[[C], str],
    said: Callable[[Record], str],
    workers: int = 1,
    deadline: float = math.inf,
    again: bool = False,
) -> dict[str, str]:
    """Measure what the store lacks.

    Args:
        measure: a cell's record; for several workers it has to pickle.
        change: names what is done to the model: refused for one cell, refused for all.
        said: a finished cell's figures, in a few words.
        deadline: of `time.monotonic()`; no cell begins after it.
        again: measure what the store has, too.

    Returns:
        Reasons, by what was refused and not tried again.
    """
    crew = _Crew(store, again, change, said)
    if workers == 1:
        for cell in todo:
            if time.monotonic() < deadline and crew.wants(cell):
                crew.finish(cell, lambda cell=cell: measure(cell))  # type: ignore[misc]
        return crew.refused
    running: dict[Future[Record], C] = {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for cell in todo:
            while len(running) == workers:
                crew.collect(running)
            if time.monotonic() < deadline and crew.wants(cell):
                running[pool.submit(measure, cell)] = cell
        while running:
            crew.collect(running)
    return crew.refused


@dataclass
class _Crew(Generic[C]):
    store: Store
    again: bool
    change: Callable[[C], str]
    said: Callable[[Record], str]
    refused: dict[str, str] = field(default_factory=dict)

    def wants(self, cell: C) -> bool:
        # Read anew each time: another run may be at work on the same store.
        kept = not self.again and cell.key in self.store.cells()
        return not kept and self.change(cell) not in self.refused

    def collect(self, running: dict[Future[Record], C]) -> None:
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            self.finish(running.pop(future), future.result)

    def finish(self, cell: C, result: Callable[[], Record]) -> None:
        try:
            record = result()
        except RefusedError as error:
            what = cell.key if isinstance(error, DivergedError) else self.change(cell)
            if what not in self.refused:
                say(f"{what}: refused: {error}")
            self.refused[what] = str(error)
            return
        self.store.append("cell", record)
        seconds = sum(record["seconds"].values())
        say(f"{cell.key}: {self.said(record)}, {seconds:.0f} s")
