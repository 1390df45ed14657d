"""What the plan changes in each layer, equal neighbours taken together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from surgery.lab.report.html.markup import Markup, join, table, tag
from surgery.lab.report.html.quantities import runs

ARROW = "\N{RIGHTWARDS ARROW}"
# Groups of more source heads than this are counted, not listed.
_LISTED = 16
_COLUMNS = ("layers", "query heads", "", "KV heads", "which share")


def layers_table(plan: Mapping[str, Any]) -> Markup | None:
    """A line per run of layers that fare alike; ``None`` where no layer is known."""
    told = plan.get("layers") or {}
    columns = list(dict.fromkeys(column for cells in told.values() for column in cells))
    lines: list[tuple[list[int], tuple[str, ...], Markup]] = []
    for place, cells, strip in _layers(plan, columns):
        if lines and lines[-1][1:] == (cells, strip):
            lines[-1][0].append(place)
        else:
            lines.append(([place], cells, strip))
    if not lines:
        return None
    names = [*_COLUMNS[3:], *columns, "implementation", "attention"]
    # What nothing is said of in any layer takes no column.
    used = [any(cells[number] for _, cells, _ in lines) for number in range(len(names) + 1)]
    rows = []
    for places, (queries, *others), strip in lines:
        rest = [cell for cell, is_used in zip(others, used[1:], strict=True) if is_used]
        rows.append([runs(places), queries, strip, *rest])
    shown = [name for name, is_used in zip(names, used[1:], strict=True) if is_used]
    head = [*_COLUMNS[:3], *shown]
    return table(head, rows, "What changes in each layer", text=range(len(head)))


def _layers(
    plan: Mapping[str, Any], columns: Sequence[str]
) -> list[tuple[int, tuple[str, ...], Markup]]:
    source, before = plan.get("source") or [], plan.get("before") or []
    after = {site["path"]: site for site in plan.get("after") or []}
    told = plan.get("layers") or {}
    found: list[tuple[int, tuple[str, ...], Markup]] = []
    for number, (old, start) in enumerate(zip(source, before, strict=False)):
        path = start["path"]
        new = after.get(path)
        query, kv = _origins(plan, path, start)
        kept = set() if new is None else {head for part in query for head in part}
        cells = (
            _pair(old["q_heads"], 0 if new is None else new["q_heads"]),
            _pair(old["kv_heads"], 0 if new is None else new["kv_heads"]),
            "" if new is None else _groups(kv),
            *(told.get(path, {}).get(column, "") for column in columns),
            plan.get("implementation") or "",
            "removed" if new is None else "",
        )
        found.append((number, cells, _strip(old["q_heads"], kept)))
    return found


def _pair(before: int, after: int) -> str:
    return str(before) if before == after else f"{before} {ARROW} {after}"


def _origins(
    plan: Mapping[str, Any], path: str, start: Mapping[str, Any]
) -> tuple[list[list[int]], list[list[int]]]:
    """Per head of the result, the source's heads that became it: query heads, KV heads."""
    query = [[head] for head in range(start["q_heads"])]
    kv = [[head] for head in range(start["kv_heads"])]
    for change in plan.get("changes") or []:
        if change["before"]["path"] == path:
            query = [[h for part in new for h in query[part]] for new in change["query"]]
            kv = [[h for part in new for h in kv[part]] for new in change["kv"]]
    return query, kv


def _groups(kv: Sequence[Sequence[int]]) -> str:
    """Which source KV heads became one."""
    if all(len(part) == 1 for part in kv):
        return ""
    if sum(map(len, kv)) <= _LISTED:
        return " | ".join(" ".join(map(str, sorted(part))) for part in kv)
    sizes = sorted({len(part) for part in kv})
    in_order = [head for part in kv for head in part] == sorted(h for part in kv for h in part)
    return f"{runs(sizes)} each, {'in order' if in_order else 'regrouped'}"


def _strip(heads: int, kept: set[int]) -> Markup:
    """A square per query head of the source: full where it stays, hollow where it goes."""
    full = "".join(f"M{8 * h + 1} 1h6v6h-6z" for h in range(heads) if h in kept)
    hollow = "".join(f"M{8 * h + 1.5} 1.5h5v5h-5z" for h in range(heads) if h not in kept)
    going = heads - len(kept)
    label = f"{len(kept)} of {heads} query heads stay" if going else f"all {heads} query heads stay"
    return tag(
        "svg",
        join(tag("path", d=full, class_="kept"), tag("path", d=hollow, class_="gone")),
        class_="strip",
        viewBox=f"0 0 {8 * heads} 8",
        width=8 * heads,
        height=8,
        role="img",
        aria_label=label,
    )
