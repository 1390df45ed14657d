"""Format numbers for people."""

from __future__ import annotations


def format_count(value: float) -> str:
    """Format a number: 1234567 → ``1.23 M``."""
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:g}"


def format_bytes(value: float) -> str:
    """Format a number of bytes: 4096 → ``4 KiB``."""
    for limit, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(value) >= limit:
            return f"{value / limit:.4g} {unit}"
    return f"{value:g} B"


def format_ratio(before: float, after: float) -> str:
    """Format after / before: ``0.5x``; empty if `before` is zero."""
    return f"{after / before:.3g}x" if before else ""
