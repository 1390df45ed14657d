"""The pictures: what is lost against the share of heads that went, a panel per case."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from benchmarks.importance.grid import ESTIMATORS
from benchmarks.importance.names import case_name, loss_name

COLOURS = {
    "leave_one_out": "#c8553d",
    "gate_gradient": "#4c6a92",
    "output_norm": "#c9a227",
    "random": "#9aa0a8",
}
_COLUMNS = 3
# Gaps below this share of a panel's largest are drawn here, with a mark that points down.
_FLOOR = 1e-3


def draw_healing(figures: Mapping[str, Any], path: Path) -> None:
    """Dashed: as cut; solid: healed."""
    _draw(figures, path, {"global": ("as cut", "--"), "healed": ("healed", "-")})


def draw_scopes(figures: Mapping[str, Any], path: Path) -> None:
    """As cut: dashed the lowest of all layers, dotted as many of every layer."""
    _draw(figures, path, {"global": ("lowest of all layers", "--"), "layer": ("per layer", ":")})


def _draw(figures: Mapping[str, Any], path: Path, runs: Mapping[str, tuple[str, str]]) -> None:
    cases = [case for case in figures["cases"] if any(map(case["pruning"]["global"].get, COLOURS))]
    columns = min(_COLUMNS, max(1, len(cases)))
    rows = max(1, math.ceil(len(cases) / columns))
    figure = Figure(figsize=(3.9 * columns, 3.2 * rows + 0.5), dpi=150)
    figure.set_layout_engine("constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, case in zip(grid.flat, cases, strict=False):
        _panel(axes, case, runs)
    for axes in grid.flat[len(cases) :]:
        axes.set_axis_off()
    handles = [Line2D([], [], color=COLOURS[n], marker="o", markersize=4) for n in ESTIMATORS]
    looks: list[Any] = [style for _, style in runs.values()]
    styles = [Line2D([], [], color="#333333", linestyle=look) for look in looks]
    figure.legend(
        [*handles, *styles],
        [*ESTIMATORS, *(text for text, _ in runs.values())],
        loc="outside upper center",
        ncols=len(handles) + len(styles),
        frameon=False,
        fontsize=8,
    )
    figure.savefig(path)


def _panel(axes: Any, case: Mapping[str, Any], runs: Mapping[str, tuple[str, str]]) -> None:
    curves = {
        (run, name): [point for point in case["pruning"][run][name] if point["removed"] > 0]
        for run in runs
        for name in ESTIMATORS
    }
    highest = max((p["gap"]["high"] for points in curves.values() for p in points), default=1.0)
    floor = _FLOOR * max(highest, 1e-9)
    for (run, name), points in curves.items():
        if points:
            _curve(axes, points, COLOURS[name], runs[run][1], floor)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_title(case_name(case), fontsize=9)
    axes.set_xlabel("query heads that went", fontsize=8)
    axes.set_ylabel(f"{loss_name(case)}, above the original's", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _curve(
    axes: Any, points: Sequence[Mapping[str, Any]], colour: str, style: str, floor: float
) -> None:
    places = [point["removed"] for point in points]

    def drawn(name: str) -> list[float]:
        return [max(floor, point["gap"][name]) for point in points]

    axes.plot(places, drawn("median"), style, color=colour, linewidth=1.6, marker="o", markersize=3)
    axes.fill_between(places, drawn("low"), drawn("high"), color=colour, alpha=0.12, linewidth=0)
    below = [p for p, point in zip(places, points, strict=True) if point["gap"]["median"] < floor]
    axes.plot(below, [floor] * len(below), "v", color=colour, markersize=6)
