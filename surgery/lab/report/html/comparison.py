"""Several runs side by side."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from surgery.files import write_text
from surgery.lab.report.figures import ROWS
from surgery.lab.report.html.data import RunFiles
from surgery.lab.report.html.page import render_page
from surgery.lab.report.html.report import REPORT
from surgery.lab.report.html.tables import Table
from surgery.lab.report.quantities import NOTHING, format_signed, round_figure

Differences = Mapping[str, Sequence[Any]]

OPERATIONS = "operations"
# Keys that are given a column of their own.
_COLUMNS = 6
# Where a run lies is no difference.
_PLACES = ("run_dir", "hydra")
# Names longer than this do not fit on a point of the picture; runs are then numbered.
_LABEL = 3
_POINTS = 200
_SIZES = ("kv_bytes_per_token", "parameters", "attention_flops")
_LOSSES = {
    "before": "loss before",
    "after_surgery": "after surgery",
    "after_training": "after healing",
}
_CURVES = {"lm": "training loss", "distill": "distance to the teacher"}
_MIXED = "what each run minimised: a loss on text, or a distance to a teacher"


@dataclass(frozen=True)
class Column:
    """A column of the table of runs: a value of each, ``None`` for none, and how it is shown."""

    title: str
    values: Sequence[Any]
    show: Callable[[Any], str] = str
    path: str = ""
    is_number: bool = True


def write_comparison(runs: Sequence[RunFiles], path: Path) -> Path:
    """Make one page of `runs` at `path`; it links to their reports, where there are any."""
    write_text(path, render_comparison(runs, path.parent))
    return path


def render_comparison(runs: Sequence[RunFiles], folder: Path) -> str:
    """The page, as it is to lie in `folder`."""
    names = name_runs(runs)
    numbers = [str(number) for number in range(1, len(runs) + 1)]
    labels = names if all(len(name) <= _LABEL for name in names) else numbers
    differences = find_differences(runs)
    main = select_main(differences)
    about = [
        {"label": label, "name": name, "differs": _list_own(main, place)}
        for place, (label, name) in enumerate(zip(labels, names, strict=True))
    ]
    data = {"scatter": _collect_points(runs, about), "curves": _collect_curves(runs, about)}
    view = {
        "title": f"{len(runs)} runs",
        "heading": "1 run" if len(runs) == 1 else f"{len(runs)} runs compared",
        "subtitle": ", ".join(dict.fromkeys(run.name for run in runs)),
        "columns": _collect_columns(runs, main),
        "names": names,
        "labels": labels,
        "links": [_link(run, folder) for run in runs],
        "rest": _tabulate_rest({k: v for k, v in differences.items() if k not in main}, labels),
    }
    drawn = {name: part for name, part in data.items() if part}
    return render_page("comparison.html.j2", drawn, view)


def name_runs(runs: Sequence[RunFiles]) -> list[str]:
    """Directories, without what all of them begin with."""
    places = [run.directory.resolve() for run in runs]
    shared = len(Path(os.path.commonpath(places)).parts)
    return ["/".join(place.parts[shared:]) or place.name for place in places]


def _link(run: RunFiles, folder: Path) -> str:
    report = run.directory / REPORT
    if not report.is_file():
        return ""
    return quote(Path(os.path.relpath(report.resolve(), folder.resolve())).as_posix())


def find_differences(runs: Sequence[RunFiles]) -> dict[str, list[Any]]:
    """Dotted config key → its value in every run, for keys whose values are not all the same.

    ``None`` where a run does not have the key. `operations` names them, where they differ.
    """
    configs = [
        dict(_flatten(_read_config(run), ""))
        | {OPERATIONS: ", ".join(str(spec["operation"]) for spec in run.operations)}
        for run in runs
    ]
    found = {}
    for key in dict.fromkeys(key for config in configs for key in config):
        values = [
            _hide_directory(run, config.get(key)) for run, config in zip(runs, configs, strict=True)
        ]
        if any(value != values[0] for value in values):
            found[key] = values
    return found


def select_main(differences: Differences) -> dict[str, Sequence[Any]]:
    """The few of them to look at first: what most runs have, the operations' options foremost."""
    common = [k for k, values in differences.items() if 2 * values.count(None) <= len(values)]
    common.sort(key=lambda key: (key != OPERATIONS, not key.startswith("attention.")))
    return {key: differences[key] for key in common[:_COLUMNS]}


def _read_config(run: RunFiles) -> Mapping[str, Any]:
    try:
        plain = OmegaConf.to_container(OmegaConf.create(run.config)) if run.config else None
    except (OmegaConfBaseException, YAMLError):
        plain = None
    if isinstance(plain, dict):
        return {str(key): value for key, value in plain.items() if key not in _PLACES}
    return {"attention": {spec["operation"]: dict(spec) for spec in run.operations}}


def _flatten(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, part in value.items():
            yield from _flatten(part, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _hide_directory(run: RunFiles, value: Any) -> Any:
    """A value to be shown and compared; paths below the run's own directory are the same in all."""
    if value is None or isinstance(value, int | float):
        return value
    return str(value).replace(str(run.directory.resolve()), "RUN_DIR")


def _list_own(differences: Differences, place: int) -> list[str]:
    """What is special about one run, in short."""
    found = {key.rpartition(".")[2]: values[place] for key, values in differences.items()}
    return [f"{key}={value}" for key, value in found.items() if value not in (None, "")]


def _tabulate_rest(differences: Differences, labels: Sequence[str]) -> Table | None:
    """Every difference that has no column of its own."""
    rows = [
        [key, *(NOTHING if value is None else value for value in values)]
        for key, values in differences.items()
    ]
    label = f"{len(rows)} more keys that differ" if len(rows) > 1 else "one more that differs"
    return Table(label, ["key", *labels], rows, range(len(labels) + 1)) if rows else None


def _collect_columns(runs: Sequence[RunFiles], differences: Differences) -> list[Column]:
    """The columns in which any run has something."""
    columns = []
    for key, values in differences.items():
        path, dot, last = key.rpartition(".")
        columns.append(Column(last, values, path=path + dot, is_number=False))
    for moment, title in _LOSSES.items():
        losses = [run.part(moment).get("loss") for run in runs]
        columns.append(Column(title, losses, "{:.4f}".format))
    ends = [(run.before.get("loss"), run.after.get("loss")) for run in runs]
    costs = [None if before is None or after is None else after - before for before, after in ends]
    columns.append(Column("cost", costs, lambda cost: format_signed(cost, 4)))
    closed = [run.summary.get("gap_closed") for run in runs]
    columns.append(Column("gap closed", closed, "{:.0%}".format))
    for size in _SIZES:
        label, show = ROWS[size]
        columns.append(Column(label, [run.after.get(size) for run in runs], show))
    decode = [run.after.get("decode_ms") for run in runs]
    columns.append(Column("decode (ms)", decode, "{:.2f}".format))
    formats = [run.part("export").get("format") for run in runs]
    columns.append(Column("export", formats, is_number=False))
    alarms = [len(run.part("training").get("alarms") or []) for run in runs]
    columns += [Column("alarms", alarms)] if any(alarms) else []
    return [column for column in columns if any(v not in (None, "") for v in column.values)]


def _collect_points(
    runs: Sequence[RunFiles], about: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Loss and sizes of every run that was measured."""
    points = [
        {**one, "loss": run.after["loss"], **{size: run.after.get(size) for size in _SIZES}}
        for run, one in zip(runs, about, strict=True)
        if "loss" in run.after
    ]
    sizes = [{"field": size, "label": ROWS[size][0], "bytes": size == _SIZES[0]} for size in _SIZES]
    return {"runs": points, "sizes": sizes} if points else None


def _collect_curves(
    runs: Sequence[RunFiles], about: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Training curves, thinned evenly; the last point stays."""
    found, objectives = [], set()
    for run, one in zip(runs, about, strict=True):
        points = run.part("training").get("curve")
        if points:
            objectives.add(run.part("training")["objective"])
            every = -(-len(points) // _POINTS)
            kept = [*points[::every], *(points[-1:] if (len(points) - 1) % every else [])]
            name = ": ".join(filter(None, [one["name"], ", ".join(one["differs"][:3])]))
            thinned = [[step, round_figure(loss)] for step, loss in kept]
            found.append({"label": one["label"], "name": name, "points": thinned})
    name = _CURVES.get(objectives.pop(), _MIXED) if len(objectives) == 1 else _MIXED
    return {"runs": found, "name": name} if found else None
