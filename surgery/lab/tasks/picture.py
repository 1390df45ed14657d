"""`tasks.png`: where tasks agree on heads, and what the mask of each costs the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from surgery.files import write_picture
from surgery.importance.table import ScoreTable
from surgery.lab.tasks.agreement import get_head_scores

_UNDER = {
    "compare": "mask for",
    "prune_each": "pruned for",
    "output_projections": "projections of",
    "one_mask": "",
}
_CENTRED = {"fontsize": 9, "ha": "center", "va": "center"}


def draw_tasks(
    found: Mapping[str, Any], tables: Mapping[str, ScoreTable] | None, path: Path
) -> None:
    """Draw rank correlations, a heatmap per task (crosses: dropped by its mask), and the losses.

    Without `tables`, only the losses are drawn.
    """
    tables = tables or {}
    panels = len(tables) + 2 if tables else 1
    figure = Figure(figsize=(1.0 + 3.1 * panels, 3.4), dpi=150)
    figure.set_layout_engine("constrained")
    axes: Sequence[Axes] = np.atleast_1d(figure.subplots(1, panels))  # type: ignore[assignment]
    if tables:
        _draw_correlations(axes[0], found)
        most = max(float(np.nanmax(_compute_shares(table))) for table in tables.values())
        for panel, (name, table) in zip(axes[1:-1], tables.items(), strict=True):
            image = _draw_heads(panel, name, table, found.get("masks", {}).get(name, {}), most)
        bar = figure.colorbar(image, ax=axes[-2])
        bar.set_label("share of the task's scores", fontsize=8)
        bar.ax.tick_params(labelsize=8)
    _draw_losses(axes[-1], found)
    for panel in axes:
        panel.tick_params(labelsize=8)
    write_picture(path, figure)


def _draw_correlations(axes: Axes, found: Mapping[str, Any]) -> None:
    matrix = [[np.nan if r is None else r for r in row] for row in found["spearman"]]
    _draw_matrix(axes, np.array(matrix), found["names"], found["names"], "{:.2f}", "RdBu", (-1, 1))
    axes.set_title(f"rank correlation\n({found['estimator']})", fontsize=10)


def _draw_heads(
    axes: Axes, name: str, table: ScoreTable, mask: Mapping[str, Sequence[int]], most: float
) -> Any:
    shares = _compute_shares(table)
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="#d0d0d0")
    image = axes.imshow(shares, aspect="auto", cmap=colours, interpolation="nearest", vmax=most)
    rows = {str(site.layer): row for row, site in enumerate(get_head_scores(table))}
    for layer, heads in mask.items():
        axes.plot(heads, [rows[str(layer)]] * len(heads), "x", color="white", markersize=5)
    axes.set_title(f"importance for {name}" + ("\n(crossed: dropped)" if mask else ""), fontsize=10)
    axes.set_xlabel("head" if table.heads is not None else "KV group", fontsize=8)
    axes.set_ylabel("layer", fontsize=8)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator("auto", integer=True))
    return image


def _draw_losses(axes: Axes, found: Mapping[str, Any]) -> None:
    losses, names = found["losses"], found["names"]
    first, *others = losses
    under = others or [first]
    costs = np.array(
        [
            [losses[one][task] - (losses[first][task] if others else 0) for one in under]
            for task in names
        ]
    )
    bound = max(float(np.abs(costs).max()), 1e-6)
    _draw_matrix(axes, costs, names, under, "{:+.3f}", "RdBu_r", (-bound, bound))
    over = f"\nover {first.replace('_', ' ')}" if others else ""
    axes.set_title(f"held-out nats/token{over}", fontsize=10)
    axes.set_ylabel("text", fontsize=8)
    axes.set_xlabel(_UNDER[found["mode"]], fontsize=8)


def _draw_matrix(
    axes: Axes,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    shown: str,
    colours: str,
    bounds: tuple[float, float],
) -> None:
    axes.imshow(values, cmap=colours, vmin=2 * bounds[0], vmax=2 * bounds[1], aspect="auto")
    axes.set_xticks(range(len(columns)), [name.replace("_", "\n") for name in columns])
    axes.set_yticks(range(len(rows)), rows)
    for (row, column), value in np.ndenumerate(values):
        text = "-" if np.isnan(value) else shown.format(value)
        axes.text(column, row, text, **_CENTRED)  # type: ignore[arg-type]


def _compute_shares(table: ScoreTable) -> np.ndarray:
    """Divide a task's scores by their absolute sum: [layers, most heads]; NaN without a head."""
    sites = get_head_scores(table)
    total = sum(abs(score) for site in sites for score in site.scores) or 1.0
    grid = np.full((len(sites), max(len(site.scores) for site in sites)), np.nan)
    for row, site in enumerate(sites):
        grid[row, : len(site.scores)] = np.array(site.scores) / total
    return grid
