"""`similarity.png`: the family tree of the heads, two similarities in its order, redundancy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.cluster.hierarchy import dendrogram, set_link_color_palette

from surgery.files import write_picture
from surgery.lab.analysis.draw_roles import COLOURS
from surgery.lab.analysis.similarity import Similarity

_BRANCHES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
# More leaves than this are not labelled.
LABELLED = 64


def draw_similarity(
    result: Mapping[str, Any], similarity: Similarity, links: np.ndarray, path: Path
) -> None:
    """Draw dendrogram, divergences, cosines in the same order, and redundancy by layer and head."""
    labels = [f"{layer}.{head}" for layer, head in similarity.heads]
    tall = min(6.6, max(4.2, 0.125 * len(labels)))
    figure = Figure(figsize=(2.6 * tall + 2.2, tall + 0.6), dpi=140)
    figure.set_layout_engine("constrained")
    tree, js, cosine, own = figure.subplots(1, 4, width_ratios=[0.42, 1, 1, 0.72])
    order = _draw_tree(tree, links, float(result["clusters"]["distance"]))
    sorted_labels = [labels[leaf] for leaf in order]
    roles = [head["role"] for head in result["heads"]]
    grid = similarity.divergence.numpy()[np.ix_(order, order)]
    _draw_matrix(figure, js, grid, "magma_r", (0, 1), sorted_labels)
    js.set_title("divergence of patterns (bits)", fontsize=10)
    signed = similarity.cosine.numpy()[np.ix_(order, order)]
    _draw_matrix(figure, cosine, signed, "RdBu_r", (-1, 1), sorted_labels)
    cosine.set_title("cosine of outputs", fontsize=10)
    if len(labels) <= LABELLED:
        for axes in (js, cosine):
            for tick, leaf in zip(axes.get_yticklabels(), order, strict=True):
                tick.set_color(_choose_text_colour(COLOURS[roles[leaf]]))
    _draw_redundancy(figure, own, result)
    write_picture(path, figure)


def _draw_tree(axes: Axes, links: np.ndarray, distance: float) -> list[int]:
    set_link_color_palette(_BRANCHES)
    plot = dendrogram(
        links,
        ax=axes,
        orientation="left",
        no_labels=True,
        color_threshold=distance,
        above_threshold_color="#9a9a92",
    )
    set_link_color_palette(None)
    axes.axvline(distance, color="#9a9a92", linewidth=0.8, linestyle=":")
    axes.set_title("families", fontsize=10)
    axes.set_xlabel("divergence (bits)", fontsize=8)
    axes.invert_yaxis()
    axes.tick_params(labelsize=7)
    axes.spines[["top", "left", "right"]].set_visible(False)
    return [int(leaf) for leaf in plot["leaves"]]


def _draw_matrix(
    figure: Figure,
    axes: Axes,
    grid: np.ndarray,
    colours: str,
    ends: tuple[float, float],
    labels: list[str],
) -> None:
    image = axes.imshow(
        grid, cmap=colours, vmin=ends[0], vmax=ends[1], interpolation="nearest", aspect="auto"
    )
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.7, aspect=30, pad=0.02)
    bar.ax.tick_params(labelsize=7)
    axes.set_xticks([])
    size = min(7.0, 330 / len(labels))
    axes.set_yticks(range(len(labels)) if len(labels) <= LABELLED else [])
    if len(labels) <= LABELLED:
        axes.set_yticklabels(labels, fontsize=size)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _draw_redundancy(figure: Figure, axes: Axes, result: Mapping[str, Any]) -> None:
    heads = result["heads"]
    layers = sorted({head["layer"] for head in heads})
    grid = np.full((len(layers), max(head["head"] for head in heads) + 1), np.nan)
    for head in heads:
        grid[layers.index(head["layer"]), head["head"]] = head["redundancy"]
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="#d0d0d0")
    image = axes.imshow(grid, cmap=colours, vmin=0, interpolation="nearest", aspect="auto")
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.8, aspect=24, pad=0.02)
    bar.ax.tick_params(labelsize=7)
    axes.set_title("redundancy within its layer", fontsize=10)
    axes.set_xlabel("head", fontsize=8)
    axes.set_ylabel("layer", fontsize=8)
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    if len(layers) > LABELLED:
        axes.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.tick_params(labelsize=8, length=0)
    axes.spines[:].set_visible(False)


def _choose_text_colour(colour: str) -> str:
    """Choose a readable colour for text: grey in place of a light fill."""
    return "#555555" if colour in (COLOURS["mixed"], COLOURS["broadcast"]) else colour
