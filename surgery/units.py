"""Numbers as people read them."""

from __future__ import annotations


def in_count(value: float) -> str:
    """1234567 → ``1.23 M``."""
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:g}"


def in_bytes(value: float) -> str:
    """4096 → ``4 KiB``."""
    for limit, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(value) >= limit:
            return f"{value / limit:.4g} {unit}"
    return f"{value:g} B"


def ratio(before: float, after: float) -> str:
    """after / before, or nothing where there is nothing to compare."""
    return f"{after / before:.3g}x" if before else ""
