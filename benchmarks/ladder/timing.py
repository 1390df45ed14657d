"""Fair timing: the rungs in turn, round after round, in one process."""

from __future__ import annotations

import ctypes
import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from benchmarks.ladder.workloads import Forward

MIN_ROUNDS = 3
_SHORTEST = 0.05  # seconds; shorter calls are timed several at once
_MOST_CALLS = 50
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
Build = Callable[[], Forward]


def keep_pages() -> None:
    """Have malloc reuse freed memory, instead of asking the system for fresh pages each time.

    Raises:
        OSError: this is not glibc.
    """
    libc = ctypes.CDLL("libc.so.6")
    if not (libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1)):
        raise OSError("mallopt refused")


@dataclass
class Cell:
    """Seconds of one workload at one length: per rung, one number per round."""

    seconds: dict[str, list[float]]
    failed: dict[str, str]

    def to_json(self, baseline: str) -> dict[str, Any]:
        """Milliseconds, and ratios of the same round: baseline / rung."""
        rungs: dict[str, Any] = {}
        base = self.seconds.get(baseline)
        for name, values in self.seconds.items():
            shown = [1e3 * value for value in values]
            rungs[name] = {"median": median(shown), "min": min(shown), "max": max(shown)}
            if base is not None:
                ratios = [a / b for a, b in zip(base, values, strict=True)]
                spread = {"median": median(ratios), "min": min(ratios), "max": max(ratios)}
                rungs[name]["speedup"] = spread
            rungs[name]["rounds"] = shown
        return rungs | {name: {"failed": reason} for name, reason in self.failed.items()}


def measure(
    builds: Mapping[str, Build],
    device: str,
    rounds: int,
    seconds: float,
    tick: Callable[[str], None] = lambda text: None,
) -> Cell:
    """Time what `builds` give, one call of each per round, after one warm-up of each.

    Args:
        rounds: how many are wanted. Fewer, but `MIN_ROUNDS` or more (unless fewer are wanted), if
            they would take longer than `seconds`.
        tick: called before each timing with what is timed.
    """
    runs: dict[str, Forward] = {}
    calls: dict[str, int] = {}
    failed: dict[str, str] = {}
    cost = 0.0
    for name, build in builds.items():
        tick(f"{name}, warm-up")
        run = None
        try:
            run = build()
            once = _timed(run, device, 1)
            if once < 1.0:  # a first call also sets things up
                once = _timed(run, device, 1)
        except torch.OutOfMemoryError:
            failed[name] = "out of memory"
        if name in failed:
            if run is not None:
                run.reset()
            del run
            _free()
            continue
        assert run is not None
        runs[name] = run
        calls[name] = max(1, min(_MOST_CALLS, math.ceil(_SHORTEST / once)))
        cost += once * calls[name]
    affordable = int(seconds / cost) if cost else rounds
    rounds = min(rounds, max(MIN_ROUNDS, affordable))
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name, run in runs.items():
            tick(f"{name}, round {number + 1}/{rounds}")
            found[name].append(_timed(run, device, calls[name]) / run.per_call)
    return Cell(found, failed)


def bandwidth(device: str, size: int) -> float:
    """Bytes per second that a big copy moves, read and written; the best of several."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    best = math.inf
    for _ in range(8):
        started = _now(device)
        target.copy_(source)
        best = min(best, _now(device) - started)
    return 2 * size / best


def fresh_pages(size: int) -> dict[str, float]:
    """Bytes per second of filling memory just allocated, and the same memory once more."""
    torch.ones(1).fill_(0)
    started = time.perf_counter()
    tensor = torch.empty(size, dtype=torch.uint8).fill_(1)
    first = time.perf_counter() - started
    started = time.perf_counter()
    tensor.fill_(2)
    return {"first_touch": size / first, "again": size / (time.perf_counter() - started)}


def _timed(run: Forward, device: str, calls: int) -> float:
    """Seconds per call. What a call leaves behind is cleared outside of the time."""
    total = 0.0
    for _ in range(calls):
        started = _now(device)
        run()
        total += _now(device) - started
        run.reset()
    return total / calls


def _now(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
