"""A score table to look at: a heatmap with error bars beside it, and the lines of a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import AsinhNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from surgery.files import write_picture

_NAMES = {
    "gate_gradient": "gate gradient",
    "output_norm": "output norm",
    "leave_one_out": "leave one out",
    "random": "random",
}
# Heads in the ranking at the right; more are not told apart.
RANKED = 64


def draw_scores(table: Mapping[str, Any], path: Path) -> None:
    """Layers downwards and heads across; beside it all heads in order, with standard errors."""
    rows, errors = _rows(table)
    grid = np.full((len(rows), max(map(len, rows))), np.nan)
    for number, row in enumerate(rows):
        grid[number, : len(row)] = row
    layers, heads = grid.shape
    figure = Figure(figsize=(7.0 + 0.28 * min(heads, 32), 1.9 + 0.26 * min(layers, 40)), dpi=130)
    figure.set_layout_engine("constrained")
    where, ranking = figure.subplots(1, 2)
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="#d0d0d0")
    # A few heads carry most of the loss: on a linear scale the others could not be told apart.
    width = max(float(np.nanmedian(np.abs(grid))), 1e-12)
    scale = AsinhNorm(width, float(np.nanmin(grid)), float(np.nanmax(grid)) or width)
    image = where.imshow(grid, aspect="auto", cmap=colours, norm=scale, interpolation="nearest")
    figure.colorbar(image, ax=where, label=str(table["unit_of_scores"]))
    where.set_xlabel("head" if table["scores"] is not None else "KV group")
    where.set_ylabel("layer")
    for axis in (where.xaxis, where.yaxis):
        axis.set_major_locator(MaxNLocator("auto", integer=True))
    where.set_title(_NAMES.get(str(table["estimator"]), str(table["estimator"])), fontsize=10)
    ranked = sorted(_lines(rows, errors), key=lambda line: -line[2])[:RANKED]
    ranking.errorbar(
        range(len(ranked)),
        [line[2] for line in ranked],
        [line[3] for line in ranked],
        fmt=".",
        markersize=5,
        linewidth=1,
        color="#4c6a92",
    )
    ranking.axhline(0.0, color="#999999", linewidth=0.8)
    ranking.set_title("in order, with standard errors", fontsize=10)
    ranking.set_xlabel("rank")
    ranking.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    for axes in (where, ranking):
        axes.tick_params(labelsize=8)
    ranking.spines[["top", "right"]].set_visible(False)
    write_picture(path, figure)


def tabulate_scores(table: Mapping[str, Any], ends: int = 5) -> Table:
    """The heads that matter most and least, with their standard errors."""
    rows, errors = _rows(table)
    ranked = sorted(_lines(rows, errors), key=lambda line: -line[2])
    name = _NAMES.get(str(table["estimator"]), str(table["estimator"]))
    found = Table(title=f"Importance by {name} ({table['unit_of_scores']})", title_justify="left")
    for column in ("rank", "layer", "head" if table["scores"] is not None else "group", "score"):
        found.add_column(column, justify="right")
    numbered = list(enumerate(ranked, start=1))
    shown = numbered if len(numbered) <= 2 * ends else [*numbered[:ends], *numbered[-ends:]]
    for place, (rank, (layer, head, score, error)) in enumerate(shown):
        found.add_row(str(rank), str(layer), str(head), f"{score:.4g} ± {error:.1g}")
        if place == ends - 1 and len(numbered) > 2 * ends:
            found.add_section()
    return found


def _rows(table: Mapping[str, Any]) -> tuple[list[list[float]], list[list[float]]]:
    kind = "" if table["scores"] is not None else "group_"
    scores = table[f"{kind}scores"]
    errors = table[f"{kind}standard_errors"]
    return scores, [[0.0 if x is None else x for x in row] for row in errors]


def _lines(
    rows: Sequence[Sequence[float]], errors: Sequence[Sequence[float]]
) -> list[tuple[int, int, float, float]]:
    return [
        (layer, head, score, errors[layer][head])
        for layer, row in enumerate(rows)
        for head, score in enumerate(row)
    ]
