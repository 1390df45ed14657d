"""What was wanted, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.observe.variants import EXPLICIT, PLAIN, WATCHED

# Peak memory of a process is not known better than this.
RESOLUTION = 2**20
# Nor is a step's time, as a share of the plain one.
TIME_RESOLUTION = 0.01
LONG = 2048


def extra_bytes(memory: Mapping[str, Any], variant: str, plain: str = PLAIN) -> int:
    """What a variant takes at its peak beyond the plain step; below zero is below resolution."""
    taken = [memory[name]["peak_bytes"] - memory[name]["before_bytes"] for name in (variant, plain)]
    return int(taken[0] - taken[1])


def growth(cells: Mapping[str, Any], variant: str) -> float | None:
    """Extra memory at the longest over that at half the length; ``None`` without such a pair.

    2 is linear, 4 is that of a map. Less than `RESOLUTION` counts as so much.
    """
    longest = max(map(int, cells))
    if str(longest // 2) not in cells:
        return None
    most, half = (
        max(RESOLUTION, extra_bytes(cells[str(length)]["memory"], variant))
        for length in (longest, longest // 2)
    )
    return most / half


def judged(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per target: what was wanted, the figure, and whether it was reached (``None``: unknown)."""
    cells = figures["lengths"]
    longest = cells[str(max(map(int, cells)))]
    watched = {int(n): cell["time"][WATCHED]["ratio"] - 1 for n, cell in cells.items()}
    long = [extra for length, extra in watched.items() if length >= LONG]
    memory = longest["memory"]
    less = extra_bytes(memory, EXPLICIT) / max(RESOLUTION, extra_bytes(memory, WATCHED))
    slower = longest["time"][EXPLICIT]["ratio"] - 1
    quicker = slower / max(TIME_RESOLUTION, watched[max(watched)])
    grown = growth(cells, WATCHED)
    default = max(cell["default"]["derived"] for cell in cells.values())
    return [
        _target("time at the default cadence, any length", "at most 2%", default, default <= 0.02),
        _target(
            f"time, every step, {figures['rows']} rows, from {LONG} tokens",
            "at most 10%",
            max(long, default=None),
            max(long, default=1.0) <= 0.1,
        ),
        _target(
            "growth of extra memory when the length doubles",
            "at most 2.5 times",
            grown,
            grown is not None and grown <= 2.5,
        ),
        _target(
            "extra memory at the longest, explicit map / every step",
            "at least 10",
            less,
            less >= 10,
        ),
        _target(
            "extra time at the longest, explicit map / every step",
            "at least 5",
            quicker,
            quicker >= 5,
        ),
    ]


def _target(what: str, wanted: str, value: float | None, reached: bool) -> dict[str, Any]:
    known = value is not None
    return {"what": what, "wanted": wanted, "value": value, "reached": reached if known else None}
