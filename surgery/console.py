"""Output for a person while a run works: rich on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

PLAIN_WIDTH = 120


def is_rank_zero() -> bool:
    """Whether this process prints and writes for the whole run."""
    return all(int(os.environ.get(name, "0")) == 0 for name in ("RANK", "LOCAL_RANK"))


def is_terminal() -> bool:
    return sys.stdout.isatty()


def _make_console() -> Console:
    return Console(
        width=None if is_terminal() else PLAIN_WIDTH, quiet=not is_rank_zero(), highlight=False
    )


def say(text: str) -> None:
    """Print one line about what happens now."""
    _make_console().print(text, markup=False, soft_wrap=True)


def print_heading(text: str) -> None:
    if is_terminal():
        _make_console().rule(text)
    else:
        _make_console().print(f"== {text}", markup=False)


def show(table: Table) -> None:
    _make_console().print(table)


class Steps:
    """Counts the finished steps of one task; `track_progress` makes it."""

    def __init__(self, description: str, total: int | None, bar: Progress | None) -> None:
        self.description = description
        self.total = total
        self.done = 0
        self._bar = bar
        self._task = bar.add_task(description, total=total) if bar is not None else None
        self._started = time.monotonic()
        self._next_line = 0.25

    def advance(self, steps: int = 1) -> None:
        self.done += steps
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, steps)
        elif self.total and self.done < self.total and self.done / self.total >= self._next_line:
            self._next_line = self.done / self.total + 0.25
            say(f"  {self.description}: {self.done}/{self.total}")

    def describe(self, text: str) -> None:
        """Change the description of the bar."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=text)

    def remove(self) -> None:
        """Remove the line of this task from the bars."""
        if self._bar is not None and self._task is not None:
            self._bar.remove_task(self._task)

    def finish(self) -> None:
        if self._bar is None:
            say(f"  {self.description}: done in {time.monotonic() - self._started:.1f} s")


# The bars on the terminal now. Rich can show one set of bars at a time.
_open: list[Progress] = []


@contextmanager
def track_progress(description: str, total: int | None = None) -> Iterator[Steps]:
    """Show a bar on a terminal; elsewhere print a line per quarter and one at the end."""
    if not is_terminal():
        steps = Steps(description, total, None)
        yield steps
        steps.finish()
        return
    if _open:  # add a line to the bars that are shown already
        steps = Steps(description, total, _open[-1])
        try:
            yield steps
        finally:
            steps.remove()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_make_console()) as bar:
        _open.append(bar)
        try:
            yield Steps(description, total, bar)
        finally:
            _open.remove(bar)
