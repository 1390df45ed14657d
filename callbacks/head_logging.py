"""Sending per-head figures to whatever loggers a run has, without a chart per head.

A 32×32 model has a thousand heads: as scalars they freeze a dashboard. So: mean and minimum per
layer as scalars, all heads as one picture now and then, and every figure in one table at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger


@dataclass(frozen=True)
class HeadGrid:
    """One metric of all heads at one step; layers may differ in their number of heads."""

    metric: str
    step: int
    layers: list[torch.Tensor]

    def array(self) -> np.ndarray:
        """[layers, most heads], NaN where a layer has no such head."""
        width = max(len(layer) for layer in self.layers)
        grid = np.full((len(self.layers), width), np.nan)
        for index, layer in enumerate(self.layers):
            grid[index, : len(layer)] = layer.numpy()
        return grid


def log_scalars(trainer: pl.Trainer, grid: HeadGrid) -> None:
    """`<metric>/mean` over all heads, and `<metric>/layer_NN/mean` and `…/min`.

    A layer of which nothing was seen has no scalars.
    """
    scalars = {f"{grid.metric}/mean": float(torch.cat(grid.layers).nanmean())}
    for index, layer in enumerate(grid.layers):
        seen = layer[~layer.isnan()]
        if len(seen):
            scalars[f"{grid.metric}/layer_{index:02d}/mean"] = float(seen.mean())
            scalars[f"{grid.metric}/layer_{index:02d}/min"] = float(seen.min())
    for logger in trainer.loggers:
        logger.log_metrics(scalars, step=grid.step)


def log_heatmap(trainer: pl.Trainer, grid: HeadGrid) -> None:
    """The picture, to the loggers that take pictures; its title says the step."""
    for logger in trainer.loggers:
        key = f"{grid.metric}/heads"
        if isinstance(logger, WandbLogger):
            # Lightning makes this step a value, `trainer/global_step`, as it does for scalars.
            logger.log_image(key, [heatmap(grid)], step=grid.step, caption=[f"step {grid.step}"])
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(key, heatmap(grid), global_step=grid.step)


def heatmap(grid: HeadGrid) -> Any:
    """A figure with layers downwards and heads across."""
    array = grid.array()
    layers, heads = array.shape
    figure = Figure(figsize=(2.2 + 0.35 * min(heads, 32), 1.4 + 0.3 * min(layers, 40)))
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="#d0d0d0")
    image = axes.imshow(array, aspect="auto", cmap=colours, interpolation="nearest")
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.set_title(f"{grid.metric.replace('_', ' ')}, step {grid.step}", fontsize=10)
    figure.colorbar(image, ax=axes)
    return figure
