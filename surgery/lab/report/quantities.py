"""Numbers and options as reports and cards show them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Letters of an operation's options; a list of heads can be long, and the plan's table has it.
OPTIONS = 400
MINUS = "\N{MINUS SIGN}"
NOTHING = "\N{EN DASH}"


def format_signed(value: float, digits: int = 3) -> str:
    """0.0512 → ``+0.051``, with a real minus sign."""
    return f"{value:+.{digits}f}".replace("-", MINUS)


def round_figure(value: float | None, digits: int = 5) -> float | None:
    """The same to so many significant digits: a page has no room for more."""
    return None if value is None else float(f"{value:.{digits}g}")


def format_change(before: float | None, after: float | None) -> str:
    """8, 2 → ``−75%``; nothing where there is nothing to compare."""
    if not before or after is None:
        return ""
    share = after / before - 1
    if abs(share) < 0.0005:
        return "same"
    return f"{share:+.{0 if abs(share) >= 0.0995 else 1}%}".replace("-", MINUS)


def format_options(spec: Mapping[str, Any], limit: int | None = OPTIONS) -> str:
    """An operation's options, in at most `limit` letters; those left open are not named."""
    given = {k: v for k, v in spec.items() if k != "operation" and v is not None}
    text = ", ".join(f"{key}={_format(value)}" for key, value in given.items())
    return text if limit is None or len(text) <= limit else f"{text[:limit]}\N{HORIZONTAL ELLIPSIS}"


def format_runs(numbers: list[int]) -> str:
    """[0, 1, 2, 5] → ``0–2, 5``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}{NOTHING}{b}" for a, b in parts)


def format_duration(seconds: float) -> str:
    """93.2 → ``1 min 33 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds >= 0.1 else f"{seconds * 1000:.0f} ms"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _format(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(map(_format, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_format(part)}" for key, part in value.items()) + "}"
    return str(value)
