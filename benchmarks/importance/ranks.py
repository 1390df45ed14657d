"""How two score tables agree, whatever their units."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median


def overlap(a: Sequence[float], b: Sequence[float], share: float, *, lowest: bool = False) -> float:
    """Of the `share` of places that `a` holds highest (lowest), the share that `b` does, too.

    At least one place; ties go to the first.
    """
    count = max(1, round(share * len(a)))
    chosen = []
    for row in (a, b):
        costs = row if lowest else [-score for score in row]
        chosen.append(set(sorted(range(len(row)), key=costs.__getitem__)[:count]))
    return len(chosen[0] & chosen[1]) / count


def spread(values: Iterable[float | None]) -> dict[str, float] | None:
    """Median, lowest and highest of those that are there."""
    there = [value for value in values if value is not None]
    return {"median": median(there), "low": min(there), "high": max(there)} if there else None
