"""Extra time and extra memory of a watched training step, by length."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.observe.targets import RESOLUTION, extra_bytes
from benchmarks.observe.variants import ALL, EAGER, EXPLICIT, WATCHED

PICTURE = Path(__file__).parents[2] / "docs/images/observe.png"
LENS = "TransformerLens"
_LINES = {
    "default": ("default cadence", "#588157", "o"),
    WATCHED: ("every step, {rows} rows", "#4c6a92", "s"),
    ALL: ("every step, all rows", "#8e7cc3", "D"),
    EAGER: ("eager, not watched", "#b8c0cc", "v"),
    EXPLICIT: ("explicit map", "#c8553d", "^"),
    LENS: ("TransformerLens", "#d9a441", "P"),
}
_LEAST = 1e-4  # of a step: less cannot be told from nothing, on a logarithmic axis


def draw(figures: Mapping[str, Any], path: Path) -> None:
    """Two panels, both axes logarithmic."""
    cells = figures["lengths"]
    lengths = [int(length) for length in cells]
    figure = Figure(figsize=(9.6, 4.2), dpi=150)
    figure.set_layout_engine("constrained")
    left, right = figure.subplots(1, 2)
    for name, (label, colour, marker) in _LINES.items():
        look = {
            "color": colour,
            "marker": marker,
            "label": label.format(rows=figures["rows"]),
            "linewidth": 1.4,
            "markersize": 5,
        }
        if name == LENS and any(cell["lens"] is None for cell in cells.values()):
            continue
        times = [max(_LEAST, _time(cell, name)) for cell in cells.values()]
        left.plot(lengths, [100 * share for share in times], **look)
        if name != "default":
            sizes = [max(RESOLUTION, _size(cell, name)) / 2**20 for cell in cells.values()]
            right.plot(lengths, sizes, **look)
    left.axhline(2, color="#588157", linestyle=":", linewidth=1)
    left.axhline(10, color="#4c6a92", linestyle=":", linewidth=1)
    right.axhline(RESOLUTION / 2**20, color="#333333", linestyle=":", linewidth=1)
    left.set_ylabel("extra time per step, %", fontsize=9)
    right.set_ylabel("extra peak memory, MiB", fontsize=9)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.set_xlabel("tokens", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _time(cell: Mapping[str, Any], name: str) -> float:
    if name == "default":
        return float(cell["default"]["derived"])
    found = cell["lens"]["time"] if name == LENS else cell["time"]
    return float(found[name]["ratio"]) - 1


def _size(cell: Mapping[str, Any], name: str) -> int:
    return extra_bytes(cell["lens"]["memory"] if name == LENS else cell["memory"], name)
