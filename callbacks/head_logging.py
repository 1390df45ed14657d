"""Sending per-head figures to whatever loggers a run has, without a chart per head.

A 32×32 model has a thousand heads: as scalars they freeze a dashboard. So: one scalar per metric
over all heads, a few metrics per layer as well, all heads as one picture now and then, and every
figure in one table at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger

from .head_picture import heatmap

_OF_HEADS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": torch.mean,
    "min": torch.amin,
    "max": torch.amax,
}


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

    def scalars(self, overall: str, by_layer: Iterable[str]) -> dict[str, float]:
        """`<metric>/<overall>` over all heads, and `<metric>/layer_NN/<each of by_layer>`.

        Where nothing was seen there is no scalar.

        Args:
            overall, by_layer: mean, min or max.
        """
        scalars = {}
        seen = torch.cat(self.layers)
        seen = seen[~seen.isnan()]
        if len(seen):
            scalars[f"{self.metric}/{overall}"] = _OF_HEADS[overall](seen).item()
        for index, layer in enumerate(self.layers):
            seen = layer[~layer.isnan()]
            if len(seen):
                for name in by_layer:
                    key = f"{self.metric}/layer_{index:02d}/{name}"
                    scalars[key] = _OF_HEADS[name](seen).item()
        return scalars


def log_scalars(trainer: pl.Trainer, scalars: dict[str, float], step: int) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(scalars, step=step)


def log_heatmap(trainer: pl.Trainer, grid: HeadGrid) -> None:
    """The picture, to the loggers that take pictures; its title says the step.

    None of a metric of which nothing was seen.
    """
    takers = [x for x in trainer.loggers if isinstance(x, WandbLogger | TensorBoardLogger)]
    if not takers or torch.cat(grid.layers).isnan().all():
        return
    key = f"{grid.metric}/heads"
    picture = heatmap(grid.array(), f"{grid.metric.replace('_', ' ')}, step {grid.step}")
    for logger in takers:
        if isinstance(logger, WandbLogger):
            # Lightning makes this step a value, `trainer/global_step`, as it does for scalars.
            logger.log_image(key, [picture], step=grid.step, caption=[f"step {grid.step}"])
        else:
            pixels = np.asarray(picture)
            logger.experiment.add_image(key, pixels, global_step=grid.step, dataformats="HWC")
