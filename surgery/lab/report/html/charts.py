"""What the page's script draws, as plain JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from surgery.lab.report.figures import MOMENT_NAMES
from surgery.lab.report.html.data import RunFiles
from surgery.lab.report.html.maps import by_layer, fixed_maps, observed_maps
from surgery.lab.report.html.roles import roles
from surgery.lab.report.summary import MOMENTS

# Alarms marked on the map.
_MARKED = 2000


def charts(run: RunFiles, room: int) -> tuple[dict[str, Any], list[str]]:
    """Curve, maps, roles and ranking, whichever there are; and what could not be drawn.

    Args:
        room: bytes for the figures of heads.
    """
    problems: list[str] = []
    maps = []
    if run.heads is not None:
        try:
            maps.append(observed_maps(run.heads, room * 3 // 4))
        except (OSError, ValueError, KeyError) as error:  # pyarrow's are among them
            problems.append(f"heads.parquet cannot be read and is left out: {error}")
    maps.append(fixed_maps("in the analysis", _analysed(run.analysis), room // 4))
    known = [found for found in maps if found is not None]
    shown = [found for found in known if found["metrics"]]
    for found in known:
        left_out = found.pop("left_out", [])
        if left_out:
            problems.append(f"No room on this page for the maps of {', '.join(left_out)}")
    drawn: dict[str, Any] = {
        "curve": _curve(run),
        "maps": shown,
        "marks": _marks(run),
        "roles": roles(run.analysis),
        "ranking": _ranking(run.importance),
    }
    return {name: part for name, part in drawn.items() if part}, problems


def _curve(run: RunFiles) -> dict[str, Any] | None:
    training = run.summary.get("training") or {}
    points = training.get("curve") or []
    if not points:
        return None
    # A distance to a teacher cannot be compared with a loss on text.
    comparable = training.get("objective") == "lm"
    levels = [
        {"moment": m, "name": f"{MOMENT_NAMES[m]}, held out", "value": run.summary[m]["loss"]}
        for m in MOMENTS
        if comparable and run.summary.get(m)
    ]
    pruned = (training.get("pruning") or {}).get("events") or []
    events = [
        {"step": event["step"], "text": f"{sum(map(len, event['closed'].values()))} heads closed"}
        for event in pruned
    ]
    return {
        "points": [[step, _rounded(loss)] for step, loss in points],
        "name": "training loss" if comparable else "distance to the teacher",
        "levels": levels,
        "events": events,
    }


def _analysed(analysis: Mapping[str, Any]) -> dict[str, list[list[Any]]]:
    """Statistics, scores and probes of every head, by name."""
    heads = analysis.get("heads") or []
    columns: dict[str, list[list[Any]]] = {}
    for part, prefix in (("statistics", ""), ("scores", "role score: "), ("probes", "probe: ")):
        names = {name: None for head in heads for name in head.get(part) or {}}
        for name in names:
            values = [(head.get(part) or {}).get(name) for head in heads]
            columns[prefix + name] = by_layer(heads, values)
    if any(head.get("redundancy") is not None for head in heads):
        columns["redundancy"] = by_layer(heads, [head.get("redundancy") for head in heads])
    return columns


def _marks(run: RunFiles) -> list[list[Any]]:
    """[step, layer, head, alarm], the first of each head and kind."""
    seen: dict[tuple[Any, ...], int] = {}
    for alarm in (run.summary.get("training") or {}).get("alarms") or []:
        where = (alarm["layer"], alarm["head"], alarm["alarm"])
        seen[where] = min(alarm["step"], seen.get(where, alarm["step"]))
    return [[step, *where] for where, step in seen.items()][:_MARKED]


def _ranking(table: Mapping[str, Any]) -> dict[str, Any] | None:
    if not table:
        return None
    units = []
    for unit, prefix in (("query heads", ""), ("KV groups", "group_")):
        scores, errors = table.get(f"{prefix}scores"), table.get(f"{prefix}standard_errors")
        if scores:
            units.append({"unit": unit, "scores": _table(scores), "errors": _table(errors or [])})
    about = {
        name: table.get(name)
        for name in ("estimator", "objective", "unit_of_scores", "data", "batches", "tokens")
    }
    return {**about, "layers": table["layers"], "units": units}


def _table(rows: Sequence[Sequence[float | None]]) -> list[list[float | None]]:
    return [[None if x is None else _rounded(x) for x in row] for row in rows]


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
