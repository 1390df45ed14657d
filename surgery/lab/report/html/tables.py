"""The tables of a report."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import rich.table

from surgery.lab.report.html.data import RunFiles
from surgery.lab.report.quantities import NOTHING, format_duration, format_runs, format_signed
from surgery.lab.tasks.table import make_agreement_table, make_losses_table

ARROW = "\N{RIGHTWARDS ARROW}"
# Groups of more source heads than this are counted, not listed.
_LISTED = 16
_CALIBRATED = {
    "keys": "keys, closed form",
    "values": "values, closed form",
    "output_closed_form": "output, closed form",
    "output_refined": "output, refined",
    "output_error_cut": "output, heads cut",
    "output_error_merged": "output, heads merged",
    "output_error_refit": "output, solved anew",
    "output_error_held_out": "the same, held out",
}


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row names it.

    Attributes:
        label: what it is called, for those who do not see it.
        rows: cells are text, nothing, or something drawn: see the macro `cell`.
        text: columns that hold text; the others are numbers.
    """

    label: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    text: Collection[int] = (0,)


def convert_table(shown: rich.table.Table) -> Table:
    """What the terminal shows."""
    rows = list(zip(*(column.cells for column in shown.columns), strict=True))
    text = [place for place, column in enumerate(shown.columns) if column.justify == "left"]
    head = [str(column.header) for column in shown.columns]
    return Table(str(shown.title), head, rows, text)


def tabulate_layers(plan: Mapping[str, Any]) -> Table | None:
    """What changes in each layer, a line per run of layers that fare alike."""
    after = {site["path"]: site for site in plan.get("after") or []}
    told = plan.get("layers") or {}
    columns = list(dict.fromkeys(column for texts in told.values() for column in texts))
    names = ["query heads", "", "KV heads", "which share", *columns, "implementation", "attention"]
    lines: list[tuple[list[int], list[Any]]] = []
    pairs = zip(plan.get("source") or [], plan.get("before") or [], strict=False)
    for place, (old, start) in enumerate(pairs):
        path = start["path"]
        new = after.get(path, {"q_heads": 0, "kv_heads": 0})
        query, kv = _trace_heads(plan, start) if path in after else ([], [])
        cells = [
            _show_pair(old["q_heads"], new["q_heads"]),
            {"heads": old["q_heads"], "kept": sorted({head for part in query for head in part})},
            _show_pair(old["kv_heads"], new["kv_heads"]),
            _list_groups(kv),
            *(told.get(path, {}).get(column, "") for column in columns),
            plan.get("implementation") or "",
            "" if path in after else "removed",
        ]
        if lines and lines[-1][1] == cells:
            lines[-1][0].append(place)
        else:
            lines.append(([place], cells))
    # What nothing is said of in any layer takes no column.
    used = [place for place in range(len(names)) if any(cells[place] for _, cells in lines)]
    rows = [[format_runs(places), *(cells[place] for place in used)] for places, cells in lines]
    head = ["layers", *(names[place] for place in used)]
    return Table("What changes in each layer", head, rows, range(len(head))) if rows else None


def _show_pair(before: int, after: int) -> str:
    return str(before) if before == after else f"{before} {ARROW} {after}"


def _trace_heads(
    plan: Mapping[str, Any], start: Mapping[str, Any]
) -> tuple[list[list[int]], list[list[int]]]:
    """Per head of the result, the source's heads that became it: query heads, KV heads."""
    query = [[head] for head in range(start["q_heads"])]
    kv = [[head] for head in range(start["kv_heads"])]
    for change in plan["changes"]:
        if change["before"]["path"] == start["path"]:
            query = [[h for part in new for h in query[part]] for new in change["query"]]
            kv = [[h for part in new for h in kv[part]] for new in change["kv"]]
    return query, kv


def _list_groups(kv: Sequence[Sequence[int]]) -> str:
    """Which source KV heads became one."""
    if all(len(part) == 1 for part in kv):
        return ""
    heads = [head for part in kv for head in part]
    if len(heads) <= _LISTED:
        return " | ".join(" ".join(map(str, sorted(part))) for part in kv)
    sizes = format_runs(sorted({len(part) for part in kv}))
    return f"{sizes} each, {'in order' if heads == sorted(heads) else 'regrouped'}"


def tabulate_calibration(run: RunFiles) -> Iterator[Table]:
    """Per operation and layer, what calibration lost: every figure it kept, as a share."""
    for operation in run.part("calibration").get("operations") or []:
        sites = operation["sites"]
        figures = [pair for site in sites.values() for pair in site.items()]
        names = dict.fromkeys(name for name, value in figures if isinstance(value, float))
        if names:
            head = ["site", *(_CALIBRATED.get(name, name.replace("_", " ")) for name in names)]
            rows = [
                [path, *(_format_share(site.get(k)) for k in names)] for path, site in sites.items()
            ]
            yield Table(f"Errors of {operation['operation']} by layer", head, rows)


def tabulate_choices(run: RunFiles) -> Iterator[Table]:
    """What a search over all layers found: the front, and what each layer may become."""
    chosen = run.part("calibration").get("chosen") or {}
    front = chosen.get("front") or []
    if front:
        head = ["at most", "is", "KL, nats", "", "KL with all layers alike", "layers"]
        worst = max((point["kl"] or 0.0 for point in front), default=0.0) or 1.0
        rows = [
            [
                f"{point['share']:.0%} of {point['cost']}",
                NOTHING if point["is"] is None else f"{point['is']:,.0f}",
                _format_divergence(point["kl"]),
                None if point["kl"] is None else {"bar": point["kl"] / worst},
                _format_divergence(point["uniform_kl"]),
                "; ".join(_group_choices(point["layers"])),
            ]
            for point in front
        ]
        yield Table("Loss against cost", head, rows, (0, 3, 5))
    scores = chosen.get("scores") or []
    names = list(dict.fromkeys(one["choice"] for row in scores for one in row["choices"]))[1:]
    if names:
        picked = {one["layer"]: one["choice"] for one in chosen["layers"]}
        rows = []
        for row in scores:
            found = {one["choice"]: one["kl"] for one in row["choices"]}
            layer = row["layer"]
            cells = [_format_divergence(found.get(name)) for name in names]
            rows.append([str(layer), picked.get(layer, ""), *cells])
        yield Table("KL with one layer changed", ["layer", "becomes", *names], rows, (0, 1))


def _format_divergence(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.4f}"


def _group_choices(layers: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    names: dict[str, list[int]] = {}
    for one in layers:
        names.setdefault(one["choice"], []).append(one["layer"])
    for name, numbers in names.items():
        yield f"{name}: {format_runs(numbers)}"


def tabulate_probes(run: RunFiles) -> Table | None:
    """Per relation, the best head against the best fixed offset."""
    rows = []
    for relation, probe in (run.analysis.get("probes") or {}).items():
        best, offset = probe["best"], probe["offset"]
        more = format_signed(100 * (best["accuracy"] - offset["accuracy"]), 0)
        row = [relation, probe["source"], f"{probe['pairs']:,}", f"{best['layer']}.{best['head']}"]
        row += [_format_share(best["accuracy"]), _format_share(offset["accuracy"])]
        rows.append([*row, format_signed(offset["offset"], 0), more])
    head = ["relation", "source", "pairs", "best head", "finds it", "fixed offset finds it"]
    return Table("Probes", [*head, "offset", "points more"], rows, (0, 1)) if rows else None


def _format_share(value: float | None) -> Any:
    return NOTHING if value is None else {"share": value}


def tabulate_tasks(run: RunFiles) -> list[Table]:
    """The losses of every task under every mask, and how far tasks agree on their heads."""
    found = run.part("tasks")
    shown = [make_losses_table(found)] if found.get("losses") else []
    shown += [make_agreement_table(found)] if found.get("spearman") else []
    return list(map(convert_table, shown))


def tabulate_times(run: RunFiles) -> Table | None:
    """Time by stage."""
    timings = run.part("timings")
    longest = max((time for stage, time in timings.items() if stage != "total"), default=0.0) or 1.0
    rows = [
        [stage, None if stage == "total" else {"bar": time / longest}, format_duration(time)]
        for stage, time in timings.items()
    ]
    return Table("Time by stage", ["stage", "", "took"], rows, (0, 1)) if rows else None
