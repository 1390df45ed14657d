"""The picture: what is left of the gap, by merge and tokens of healing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.merge_quality.figures import find
from benchmarks.merge_quality.grid import MERGES, NO_TRAINING

_COLOURS = {
    "mean": "#7f8794",
    "first": "#c9b458",
    "aligned": "#8fb3d9",
    "aligned_renorm": "#4c6a92",
    "optimal": "#c8553d",
}
# A distilled model can become the original at best; one trained on text, the control.
ROWS = {
    "distill": ("remaining", "to the original"),
    "lm": ("remaining_control", "to the control"),
}
_FLOOR = 1e-3  # shares below are drawn here, with a mark that points down


def draw(figures: Mapping[str, Any], path: Path) -> None:
    """A row per objective, a panel per ratio, a line per merge: medians, and each model faintly."""
    preset = figures["preset"]
    ratios, shares = preset["ratios"], preset["shares"]
    rows = [name for name in ROWS if name in preset["objectives"]]
    figure = Figure(figsize=(3.6 * len(ratios) + 1.2, 3.1 * len(rows) + 0.5), dpi=150)
    figure.set_layout_engine("constrained")
    grid = figure.subplots(len(rows), len(ratios), squeeze=False, sharey=True)
    for objective, line in zip(rows, grid, strict=True):
        for ratio, axes in zip(ratios, line, strict=True):
            _panel(axes, figures["groups"], ratio, shares, objective)
            axes.set_title(f"{ratio}, healed by {objective}", fontsize=9)
        line[0].set_ylabel(f"gap {ROWS[objective][1]},\n/ gap of mean with no training", fontsize=8)
    handles = {
        text: handle
        for axes in grid.flat
        for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside upper center",
        ncols=len(MERGES),
        frameon=False,
        fontsize=8,
    )
    figure.savefig(path)


def _panel(axes: Any, groups: Any, ratio: str, shares: list[float], objective: str) -> None:
    name = ROWS[objective][0]
    for merge in MERGES:
        median: list[tuple[int, float]] = []
        each: dict[str, list[tuple[int, float]]] = {}
        for place, share in enumerate(shares):
            group = find(groups, merge, ratio, share, objective if share else NO_TRAINING)
            if group is None:
                continue
            if group["all"][name] is not None:
                median.append((place, group["all"][name]))
            for kind, figures in group["kinds"].items():
                if figures[name] is not None:
                    each.setdefault(kind, []).append((place, figures[name]))
        for points in each.values() if len(each) > 1 else ():
            _line(axes, points, _COLOURS[merge], linewidth=0.7, alpha=0.35)
        if median:
            _line(axes, median, _COLOURS[merge], linewidth=2, marker="o", label=merge)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(range(len(shares)), [f"{share:.0%}" for share in shares])
    axes.set_xlabel("tokens of healing, of those of training", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.08)


def _line(axes: Any, points: list[tuple[int, float]], colour: str, **style: Any) -> None:
    places = [place for place, _ in points]
    axes.plot(places, [max(_FLOOR, value) for _, value in points], color=colour, **style)
    below = [place for place, value in points if value < _FLOOR]
    if below:
        axes.plot(below, [_FLOOR] * len(below), "v", color=colour, markersize=7)
