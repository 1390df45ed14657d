"""What things are called on the page and in the pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.importance.presets import BERT

_UNITS = {"heads": "query heads", "groups": "KV groups"}
RUN_NAMES = {
    "global": "as cut, lowest of all layers",
    "layer": "as cut, as many of every layer",
    "healed": "healed, lowest of all layers",
}


def case_name(case: Mapping[str, Any]) -> str:
    return f"{case['kind']}, {_UNITS[case['unit']]}"


def loss_name(case: Mapping[str, Any]) -> str:
    return "1 - cosine" if case["kind"] == BERT else "nats per token"


def listed(words: Sequence[str]) -> str:
    """a; a and b; a, b and c."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
