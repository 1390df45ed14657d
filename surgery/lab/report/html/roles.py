"""The role of every head: a letter and a colour for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# A letter for each; their order is that of the page's colours.
_LETTERS = {
    "previous_token": "P",
    "first_token": "F",
    "induction": "I",
    "duplicate_token": "D",
    "positional": "O",
    "broadcast": "B",
    "syntactic": "S",
}
_COLOURS = 8
MIXED = "mixed"


def roles(analysis: Mapping[str, Any]) -> dict[str, Any] | None:
    """Legend and heads, as columns: layer, head, role's place in the legend, what was found."""
    heads = [head for head in analysis.get("heads") or [] if head.get("role") is not None]
    if not heads:
        return None
    names = sorted({str(head["role"]) for head in heads}, key=_place)
    taken: set[str] = set()
    legend = []
    colours = iter(range(len(_LETTERS), 10**6))
    for name in names:
        count = sum(str(head["role"]) == name for head in heads)
        letter = _letter(name, taken)
        taken.add(letter)
        legend.append(
            {
                "name": name.replace("_", " "),
                "letter": letter,
                "count": count,
                "colour": None if name == MIXED else _colour(name, colours),
            }
        )
    return {
        "legend": legend,
        "thresholds": {
            k: v
            for k, v in (analysis.get("thresholds") or {}).items()
            if isinstance(v, int | float)
        },
        "layer": [head["layer"] for head in heads],
        "head": [head["head"] for head in heads],
        "role": [names.index(str(head["role"])) for head in heads],
        "score": [_score(head) for head in heads],
        "kv_head": [head.get("kv_head") for head in heads],
        "redundancy": [_rounded(head.get("redundancy")) for head in heads],
        "nearest": [head.get("nearest") for head in heads],
        "cluster": [head.get("cluster") for head in heads],
        "offset": [_told(head, "positional", "offset") for head in heads],
        "relation": [_told(head, "syntactic", "relation") for head in heads],
    }


def _place(name: str) -> tuple[bool, int, str]:
    """Known ones first, in their order; mixed ones last."""
    order = list(_LETTERS)
    return name == MIXED, order.index(name) if name in order else len(order), name


def _colour(name: str, free: Iterator[int]) -> int:
    return list(_LETTERS).index(name) if name in _LETTERS else next(free) % _COLOURS


def _letter(name: str, taken: set[str]) -> str:
    wanted = "\N{MIDDLE DOT}" if name == MIXED else _LETTERS.get(name, name[:1].upper())
    if wanted and wanted not in taken:
        return wanted
    free = [c for c in name.upper() + "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c.isalpha()]
    return next((c for c in free if c not in taken), "?")


def _score(head: Mapping[str, Any]) -> float | None:
    return _rounded((head.get("scores") or {}).get(head["role"]))


def _told(head: Mapping[str, Any], role: str, name: str) -> Any:
    """What a role is about: of use where the head has that role."""
    return head.get(name) if head["role"] == role else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
