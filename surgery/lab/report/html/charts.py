"""What the page's script draws, as plain JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

from surgery.lab.report.figures import MOMENT_NAMES
from surgery.lab.report.html.data import RunFiles
from surgery.lab.report.html.maps import pack_maps, read_maps
from surgery.lab.report.quantities import round_figure

# Alarms marked on the map.
_MARKED = 2000
# A letter for each role; their order is that of the page's colours.
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


def collect_charts(run: RunFiles, room: int) -> tuple[dict[str, Any], list[str]]:
    """Curve, maps, roles and ranking, whichever there are; and what could not be drawn.

    Args:
        room: bytes for the figures of heads.
    """
    maps, problems = [], []
    if run.heads is not None:
        try:
            maps.append(read_maps(run.heads, room * 3 // 4))
        except (OSError, ValueError, KeyError) as error:  # pyarrow's are among them
            problems.append(f"{run.heads.name} cannot be read and is left out: {error}")
    heads = run.analysis.get("heads") or []
    places = [(head["layer"], head["head"]) for head in heads]
    maps.append(pack_maps("in the analysis", places, _collect_columns(heads), room // 4))
    left_out = [name for found in maps if found for name in found.pop("left_out", [])]
    if left_out:
        problems.append(f"No room on this page for the maps of {', '.join(left_out)}")
    drawn = {
        "curve": _collect_curve(run),
        "maps": [found for found in maps if found and found["metrics"]],
        "marks": _collect_marks(run),
        "roles": _collect_roles(run.analysis),
        "ranking": _collect_ranking(run.importance),
    }
    return {name: part for name, part in drawn.items() if part}, problems


def _collect_curve(run: RunFiles) -> dict[str, Any] | None:
    training = run.part("training")
    points = training.get("curve")
    if not points:
        return None
    # A distance to a teacher cannot be compared with a loss on text.
    comparable = training["objective"] == "lm"
    levels = [
        {"moment": moment, "name": f"{MOMENT_NAMES[moment]}, held out", "value": figures["loss"]}
        for moment, figures in run.measured.items()
        if comparable
    ]
    events = []
    for event in (training.get("decision") or {}).get("events") or []:
        closed = sum(map(len, event.get("closed", {}).values()))
        events.append(
            {"step": event["step"], "text": f"{closed} heads closed" if closed else "decided"}
        )
    name = "training loss" if comparable else "distance to the teacher"
    rounded = [[step, round_figure(loss)] for step, loss in points]
    return {"points": rounded, "name": name, "levels": levels, "events": events}


def _collect_columns(heads: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Statistics, scores and probes of every head, by name."""
    columns = {}
    for part, prefix in (("statistics", ""), ("scores", "role score: "), ("probes", "probe: ")):
        for name in dict.fromkeys(name for head in heads for name in head.get(part) or {}):
            columns[prefix + name] = [(head.get(part) or {}).get(name) for head in heads]
    redundancy = [head.get("redundancy") for head in heads]
    return columns | ({"redundancy": redundancy} if any(r is not None for r in redundancy) else {})


def _collect_marks(run: RunFiles) -> list[list[Any]]:
    """[step, layer, head, alarm], the first of each head and kind."""
    seen: dict[tuple[Any, ...], int] = {}
    for alarm in run.part("training").get("alarms") or []:
        where = (alarm["layer"], alarm["head"], alarm["alarm"])
        seen[where] = min(alarm["step"], seen.get(where, alarm["step"]))
    return [[step, *where] for where, step in seen.items()][:_MARKED]


def _collect_ranking(table: Mapping[str, Any]) -> dict[str, Any] | None:
    if not table:
        return None
    units = [
        {"unit": unit, "scores": _round_rows(scores), "errors": _round_rows(errors or [])}
        for unit, scores, errors in (
            ("query heads", table.get("scores"), table.get("standard_errors")),
            ("KV groups", table.get("group_scores"), table.get("group_standard_errors")),
        )
        if scores
    ]
    about = ("layers", "estimator", "objective", "unit_of_scores", "data", "batches", "tokens")
    return {**{name: table.get(name) for name in about}, "units": units}


def _round_rows(rows: Sequence[Sequence[float | None]]) -> list[list[float | None]]:
    return [list(map(round_figure, row)) for row in rows]


def _collect_roles(analysis: Mapping[str, Any]) -> dict[str, Any] | None:
    """Legend and heads, as columns: layer, head, role's place in the legend, what was found."""
    heads = [head for head in analysis.get("heads") or [] if head.get("role") is not None]
    roles = [str(head["role"]) for head in heads]
    names = sorted(set(roles), key=_place_role)
    letters: list[str] = []
    legend = []
    free = count(len(_LETTERS))
    for name in names:
        colour = _place_role(name)[1] if name in _LETTERS else next(free) % _COLOURS
        letters.append(_choose_letter(name, letters))
        label = {"name": name.replace("_", " "), "letter": letters[-1], "count": roles.count(name)}
        legend.append({**label, "colour": None if name == MIXED else colour})
    plain = ("layer", "head", "kv_head", "nearest", "cluster")
    found: dict[str, Any] = {name: [head.get(name) for head in heads] for name in plain}
    # What a role is about is of use where the head has that role.
    for role, name in (("positional", "offset"), ("syntactic", "relation")):
        found[name] = [head.get(name) if head["role"] == role else None for head in heads]
    scores = [(head.get("scores") or {}).get(head["role"]) for head in heads]
    found["score"] = [round_figure(score, 4) for score in scores]
    found["redundancy"] = [round_figure(head.get("redundancy"), 4) for head in heads]
    found["role"] = [names.index(role) for role in roles]
    limits = analysis.get("thresholds") or {}
    found["thresholds"] = {k: v for k, v in limits.items() if isinstance(v, int | float)}
    return {"legend": legend, **found} if heads else None


def _place_role(name: str) -> tuple[bool, int, str]:
    """Known ones first, in their order; mixed ones last."""
    order = list(_LETTERS)
    return name == MIXED, order.index(name) if name in order else len(order), name


def _choose_letter(name: str, taken: Sequence[str]) -> str:
    wanted = "\N{MIDDLE DOT}" if name == MIXED else _LETTERS.get(name, name[:1].upper())
    if wanted and wanted not in taken:
        return wanted
    free = [c for c in name.upper() + "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c.isalpha()]
    return next((c for c in free if c not in taken), "?")
