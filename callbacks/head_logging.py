"""Log figures of heads to all loggers of a run, without a chart per head.

A 32×32 model has a thousand heads, and as many scalars would freeze a dashboard. So there is one
scalar per metric over all heads, a few metrics per layer, sometimes a picture of all heads, and a
table with every figure at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger

from .head_picture import draw_heatmap

_OF_HEADS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": torch.mean,
    "min": torch.amin,
    "max": torch.amax,
}


@dataclass(frozen=True)
class HeadGrid:
    """One metric of all heads at one step; layers may have different numbers of heads."""

    metric: str
    step: int
    layers: list[torch.Tensor]

    def to_array(self) -> np.ndarray:
        """Make an array [layers, most heads]; NaN where a layer has no such head."""
        width = max(len(layer) for layer in self.layers)
        grid = np.full((len(self.layers), width), np.nan)
        for index, layer in enumerate(self.layers):
            grid[index, : len(layer)] = layer.numpy()
        return grid

    def to_scalars(self, overall: str, by_layer: Iterable[str]) -> dict[str, float]:
        """Make `<metric>/<overall>` over all heads, and `<metric>/layer_NN/<each of by_layer>`.

        There is no scalar where nothing was observed.

        Args:
            overall, by_layer: mean, min or max.
        """
        scalars = {}
        observed = torch.cat(self.layers)
        observed = observed[~observed.isnan()]
        if len(observed):
            scalars[f"{self.metric}/{overall}"] = _OF_HEADS[overall](observed).item()
        for index, layer in enumerate(self.layers):
            observed = layer[~layer.isnan()]
            if len(observed):
                for name in by_layer:
                    key = f"{self.metric}/layer_{index:02d}/{name}"
                    scalars[key] = _OF_HEADS[name](observed).item()
        return scalars


def log_scalars(trainer: pl.Trainer, scalars: dict[str, float], step: int) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(scalars, step=step)


def log_heatmap(trainer: pl.Trainer, grid: HeadGrid) -> None:
    """Log a picture to the loggers that accept pictures; its title has the step.

    There is no picture of a metric that was not observed.
    """
    loggers = [x for x in trainer.loggers if isinstance(x, WandbLogger | TensorBoardLogger)]
    if not loggers or torch.cat(grid.layers).isnan().all():
        return
    key = f"{grid.metric}/heads"
    picture = draw_heatmap(grid.to_array(), f"{grid.metric.replace('_', ' ')}, step {grid.step}")
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            # Lightning logs this step as `trainer/global_step`, as it does for scalars.
            logger.log_image(key, [picture], step=grid.step, caption=[f"step {grid.step}"])
        else:
            pixels = np.asarray(picture)
            logger.experiment.add_image(key, pixels, global_step=grid.step, dataformats="HWC")
