"""Several runs side by side."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from surgery.files import write_text
from surgery.lab.report.html.data import RunFiles
from surgery.lab.report.html.differences import differences, main_differences
from surgery.lab.report.html.markup import Markup, fold, join, section, table, tag
from surgery.lab.report.html.page import page
from surgery.lab.report.html.quantities import signed
from surgery.lab.report.html.report import REPORT, drawing, toggle
from surgery.lab.report.html.verdict import ends
from surgery.units import format_bytes, format_count

NOTHING = "\N{EN DASH}"
# Names longer than this do not fit on a point of the picture; runs are then numbered.
_LABEL = 3
_POINTS = 200
# field → label, whether it is bytes
_SIZES = {
    "kv_bytes_per_token": ("KV cache per token", True),
    "parameters": ("parameters", False),
    "attention_flops": ("attention FLOPs per window", False),
}
_LOSSES = {
    "before": "loss before",
    "after_surgery": "after surgery",
    "after_training": "after healing",
}


@dataclass(frozen=True)
class Column:
    """A column of the table of runs.

    Attributes:
        title: text or markup.
        cells: what is shown, and what is sorted by ("" where there is nothing).
        number: whether it is set to the right.
    """

    title: Any
    cells: list[tuple[Any, Any]]
    number: bool = True


def write_comparison(runs: Sequence[RunFiles], path: Path) -> Path:
    """Make one page of `runs` at `path`; it links to their reports, where there are any."""
    write_text(path, comparison_page(runs, path.parent))
    return path


def comparison_page(runs: Sequence[RunFiles], folder: Path) -> str:
    """The page, as it is to lie in `folder`."""
    names = run_names(runs)
    short = all(len(name) <= _LABEL for name in names)
    labels = names if short else [str(number) for number in range(1, len(runs) + 1)]
    differ = differences(runs)
    shown = main_differences(differ)
    rest = {key: values for key, values in differ.items() if key not in shown}
    scatter = _scatter(runs, names, labels, shown)
    curves = _curves(runs, names, labels, shown)
    models = ", ".join(dict.fromkeys(run.name for run in runs))
    body = join(
        tag(
            "header",
            tag("div", tag("p", "Attention surgery", class_="eyebrow"), toggle(), class_="top"),
            tag("h1", "1 run" if len(runs) == 1 else f"{len(runs)} runs compared"),
            tag("p", models, class_="quiet subtitle"),
        ),
        tag(
            "main",
            section("runs", "Runs", _runs(runs, names, labels, shown, folder), _rest(rest, labels)),
            section("tradeoff", "Loss against size", drawing("scatter") if scatter else None),
            section("curves", "Healing", drawing("curves") if curves else None),
        ),
        tag("footer", "Made from the runs' files alone; this page loads nothing."),
    )
    data = {"scatter": scatter, "curves": curves}
    title = f"{len(runs)} runs: attention surgery"
    return page(title, body, {name: part for name, part in data.items() if part})


def run_names(runs: Sequence[RunFiles]) -> list[str]:
    """Directories, without what all of them begin with."""
    parts = [run.directory.resolve().parts for run in runs]
    shared = 0
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared += 1
    return ["/".join(part[min(shared, len(part) - 1) :]) for part in parts]


def _runs(
    runs: Sequence[RunFiles],
    names: Sequence[str],
    labels: Sequence[str],
    differ: Mapping[str, Sequence[Any]],
    folder: Path,
) -> Markup:
    links = [_linked(run, name, folder) for run, name in zip(runs, names, strict=True)]
    if list(labels) != list(names):
        links = [
            join(tag("span", f"{label}  ", class_="quiet"), link)
            for label, link in zip(labels, links, strict=True)
        ]
    columns = [Column("run", list(zip(links, range(len(runs)), strict=True)), number=False)]
    for key, values in differ.items():
        path, _, last = key.rpartition(".")
        title = join(tag("span", f"{path}.", class_="path") if path else None, last)
        cells = [(_shown(value), "" if value is None else value) for value in values]
        columns.append(Column(title, cells, number=False))
    for moment, name in _LOSSES.items():
        losses = [(run.summary.get(moment) or {}).get("loss") for run in runs]
        columns.append(Column(name, [_figure(loss, ".4f") for loss in losses]))
    columns.append(Column("cost", [_cost(run) for run in runs]))
    closed = [_figure(run.summary.get("gap_closed"), ".0%") for run in runs]
    columns.append(Column("gap closed", closed))
    for field, (name, is_bytes) in _SIZES.items():
        found = [ends(run)[1].get(field) for run in runs]
        amount = format_bytes if is_bytes else format_count
        cells = [(NOTHING, "") if value is None else (amount(value), value) for value in found]
        columns.append(Column(name, cells))
    decode = [_figure(ends(run)[1].get("decode_ms"), ".2f") for run in runs]
    columns.append(Column("decode (ms)", decode))
    formats = [(run.summary.get("export") or {}).get("format") for run in runs]
    columns.append(Column("export", [(f or NOTHING, f or "") for f in formats], number=False))
    alarms = [len((run.summary.get("training") or {}).get("alarms") or []) for run in runs]
    if any(alarms):
        columns.append(Column("alarms", [(count, count) for count in alarms]))
    return _sortable([c for c in columns if any(key != "" for _, key in c.cells)], labels)


def _sortable(columns: Sequence[Column], labels: Sequence[str]) -> Markup:
    head = [tag("th", c.title, scope="col", class_="number" if c.number else None) for c in columns]
    lines = []
    for place, label in enumerate(labels):
        cells = []
        for number, column in enumerate(columns):
            shown, key = column.cells[place]
            name, scope = ("td", None) if number else ("th", "row")
            kind = "number" if column.number else None
            cells.append(tag(name, shown, class_=kind, scope=scope, data_value=key))
        lines.append(tag("tr", cells, data_run=label))
    whole = tag(
        "table",
        tag("thead", tag("tr", head)),
        tag("tbody", lines),
        class_="sortable",
        data_sortable=True,
    )
    return tag("div", whole, class_="scroll", role="region", aria_label="Runs")


def _linked(run: RunFiles, name: str, folder: Path) -> Markup:
    report = run.directory / REPORT
    if not report.is_file():
        return join(name)
    path = Path(os.path.relpath(report.resolve(), folder.resolve())).as_posix()
    return tag("a", name, href=quote(path))


def _figure(value: float | None, form: str) -> tuple[str, Any]:
    return (NOTHING, "") if value is None else (format(value, form), value)


def _cost(run: RunFiles) -> tuple[str, Any]:
    before, after = ends(run)
    if "loss" not in before or "loss" not in after:
        return NOTHING, ""
    cost = after["loss"] - before["loss"]
    return signed(cost, 4), cost


def _shown(value: Any) -> str:
    return NOTHING if value is None else str(value)


def _rest(differ: Mapping[str, Sequence[Any]], labels: Sequence[str]) -> Markup | None:
    if not differ:
        return None
    rows = [[key, *map(_shown, values)] for key, values in differ.items()]
    label = f"{len(differ)} more keys that differ" if len(differ) > 1 else "one more that differs"
    return fold(label, table(["key", *labels], rows, label, text=range(len(labels) + 1)))


def _differs(differ: Mapping[str, Sequence[Any]], place: int) -> list[str]:
    """What is special about one run, in short."""
    found = {key.rpartition(".")[2]: values[place] for key, values in differ.items()}
    return [f"{key}={value}" for key, value in found.items() if value not in (None, "")]


def _scatter(
    runs: Sequence[RunFiles],
    names: Sequence[str],
    labels: Sequence[str],
    differ: Mapping[str, Sequence[Any]],
) -> dict[str, Any] | None:
    points = []
    for place, run in enumerate(runs):
        after = ends(run)[1]
        if "loss" in after:
            points.append(
                {
                    "label": labels[place],
                    "name": names[place],
                    "loss": after["loss"],
                    "differs": _differs(differ, place),
                    **{size: after.get(size) for size in _SIZES},
                }
            )
    sizes = [{"field": f, "label": label, "bytes": b} for f, (label, b) in _SIZES.items()]
    return {"runs": points, "sizes": sizes} if points else None


def _curves(
    runs: Sequence[RunFiles],
    names: Sequence[str],
    labels: Sequence[str],
    differ: Mapping[str, Sequence[Any]],
) -> dict[str, Any] | None:
    found, objectives = [], set()
    for place, run in enumerate(runs):
        training = run.summary.get("training") or {}
        points = training.get("curve") or []
        if not points:
            continue
        objectives.add(training.get("objective"))
        every = -(-len(points) // _POINTS)
        kept = [*points[::every], *(points[-1:] if (len(points) - 1) % every else [])]
        special = ", ".join(_differs(differ, place)[:3])
        found.append(
            {
                "label": labels[place],
                "name": f"{names[place]}: {special}" if special else names[place],
                "points": [[step, float(f"{loss:.5g}")] for step, loss in kept],
            }
        )
    if not found:
        return None
    names_of = {"lm": "training loss", "distill": "distance to the teacher"}
    mixed = "what each run minimised: a loss on text, or a distance to a teacher"
    name = names_of.get(str(objectives.pop()), mixed) if len(objectives) == 1 else mixed
    return {"runs": found, "name": name}
