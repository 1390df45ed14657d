"""`probes.png`: per relation, the best head beside the best fixed offset."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from surgery.files import write_picture

_HEAD, _OFFSET = "#d55e00", "#8a8a80"
# Relations that are drawn; more would be unreadable.
MOST = 40


def draw_probes(result: Mapping[str, Any], path: Path) -> None:
    """Draw the probes of `heads.json`: the relations with the largest gain, the best on top."""
    lines = sorted(result["probes"].items(), key=lambda line: _compute_gain(line[1]))[-MOST:]
    figure = Figure(figsize=(7.6, 1.15 + 0.3 * len(lines)), dpi=150)
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    for row, (_, probe) in enumerate(lines):
        best, offset = probe["best"], probe["offset"]
        ends = sorted((best["accuracy"], offset["accuracy"]))
        axes.plot(ends, [row, row], color="#d9d9d2", linewidth=2.5, zorder=1)
        axes.plot(offset["accuracy"], row, "D", color=_OFFSET, markersize=5, zorder=2)
        axes.plot(best["accuracy"], row, "o", color=_HEAD, markersize=7, zorder=3)
        axes.annotate(
            f"{best['layer']}.{best['head']}",
            (best["accuracy"], row),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=7,
            color=_HEAD,
        )
    names = [f"{name}   {probe['offset']['offset']:+d}" for name, probe in lines]
    axes.set_yticks(range(len(lines)), [name.replace("-", "\u2212") for name in names])
    right = axes.twinx()
    right.set_ylim(-0.7, len(lines) - 0.2)
    axes.set_ylim(-0.7, len(lines) - 0.2)
    right.set_yticks(range(len(lines)), [f"{probe['judged']:,}" for _, probe in lines])
    right.set_title("pairs", fontsize=8, loc="right")
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("accuracy on the half of the text that chose neither", fontsize=9)
    axes.plot([], [], "o", color=_HEAD, markersize=7, label="best head (layer.head)")
    axes.plot([], [], "D", color=_OFFSET, markersize=5, label="best offset, in words, at the left")
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8.5)
    for one in (axes, right):
        one.tick_params(labelsize=8, length=0)
        one.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color="#eeeeea", zorder=0)
    axes.set_axisbelow(True)
    write_picture(path, figure)


def _compute_gain(probe: Mapping[str, Any]) -> float:
    return float(probe["best"]["accuracy"] - probe["offset"]["accuracy"])
