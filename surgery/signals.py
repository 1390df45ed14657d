"""SIGTERM and Ctrl-C end a run in order: what is open is closed, and the status says why."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM)


class Stopped(SystemExit):
    """A signal has ended the run. As a `SystemExit`, with 128 + the signal's number.

    Attributes:
        signal: which one.
        stage: of the run, if one had begun.
        step: optimizer steps done, in training.
        checkpoint: the newest one of this training.
        run_dir: of the run.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)
        self.stage: str | None = None
        self.step: int | None = None
        self.checkpoint: Path | None = None
        self.run_dir: Path | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Stopped, (int(self.signal),)


@contextmanager
def naming_stage(name: str) -> Iterator[None]:
    """Tell a signal that ends the run within which stage it was."""
    try:
        yield
    except Stopped as stop:
        stop.stage = stop.stage or name
        raise


class _Handler:
    """Raises `Stopped` at the first signal; a second one ends the process at once."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._raised = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._raised or os.getpid() != self._process:  # a fork has nothing to close
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._raised = True
        raise Stopped(number)


_active: list[_Handler] = []


@contextmanager
def raise_on_signals() -> Iterator[None]:
    """Raise `Stopped` for SIGINT and SIGTERM within; signals that are ignored stay so.

    Only the main thread can: in others nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOPPING}
    _active.append(_Handler())
    handle_signals_again()
    try:
        yield
    finally:
        _active.pop()
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def handle_signals_again() -> None:
    """Take back the signals that a library has taken over within `raise_on_signals`."""
    if not _active or threading.current_thread() is not threading.main_thread():
        return
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _active[-1])
