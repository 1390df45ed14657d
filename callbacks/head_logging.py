"""Log figures of heads to all loggers of a run, without a chart per head.

A 32×32 model has a thousand heads, and as many scalars would freeze a dashboard. So there is one
scalar per metric over all heads, a few metrics per layer, sometimes a picture of all heads, and a
table with every figure at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import wandb
from PIL import Image

from surgery.console import say

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

    What a logger is, is asked of its `experiment`: Lightning goes by two names, and the classes of
    one are none of the other. There is no picture of a metric that was not observed.
    """
    if torch.cat(grid.layers).isnan().all():
        return
    key = f"{grid.metric}/heads"
    title = f"{grid.metric.replace('_', ' ')}, step {grid.step}"
    picture: Image.Image | None = None
    for logger in trainer.loggers:
        if is_off(logger):
            continue
        run, writer = find_wandb_run(logger), _find_picture_writer(logger)
        if run is None and writer is None:
            say_unsent(trainer, logger, "pictures of heads")
            continue
        picture = picture or draw_heatmap(grid.to_array(), title)
        if run is not None:
            shown = wandb.Image(picture, caption=f"step {grid.step}")
            # Lightning logs this step as `trainer/global_step`, as it does for scalars.
            logger.log_metrics({key: [shown]}, step=grid.step)  # type: ignore[dict-item]
        elif writer is not None:
            writer.add_image(key, np.asarray(picture), global_step=grid.step, dataformats="HWC")


def find_wandb_run(logger: Any) -> wandb.Run | None:
    """Find the W&B run that a logger of any class writes to; ``None`` if there is none.

    A disabled run counts as none.
    """
    run = getattr(logger, "experiment", None)
    return run if isinstance(run, wandb.Run) and not run.disabled else None


def is_off(logger: Any) -> bool:
    """Whether the user has disabled the W&B run of a logger."""
    run = getattr(logger, "experiment", None)
    return isinstance(run, wandb.Run) and run.disabled


def _find_picture_writer(logger: Any) -> Any:
    """Find TensorBoard's writer behind a logger of any class."""
    writer = getattr(logger, "experiment", None)
    names = {kind.__name__ for kind in type(writer).__mro__}  # torch's own, or tensorboardX's
    return writer if "SummaryWriter" in names else None


def say_unsent(trainer: pl.Trainer, logger: Any, what: str) -> None:
    """Say once per run what a logger does not take.

    Args:
        what: in the plural.
    """
    line = f"  {type(logger).__name__} does not take {what}"
    said: set[str] = trainer.__dict__.setdefault("_said_unsent", set())
    if line not in said:
        said.add(line)
        say(line)
