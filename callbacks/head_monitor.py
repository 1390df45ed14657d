"""What all head monitors share: when to look, how to add up, where to send it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from transformers import PreTrainedModel

from surgery.errors import ConfigError, TapError
from surgery.observation import AttentionCall, Tap
from surgery.observation.head_sums import HeadSums

from .head_logging import HeadGrid, log_heatmap, log_scalars


class HeadMonitor(Callback):
    """Observes every `every_n_steps`-th optimizer step, the first included.

    Subclasses name their `metrics` (the first one is drawn and logged per layer) and say how one
    attention call adds to them.

    Args:
        every_n_steps: cadence of observation; between two observed steps nothing is in the way.
        heatmap_every_n_steps: cadence of the [layers × heads] picture; a multiple of the above.
    """

    name: str
    metrics: tuple[str, ...]

    def __init__(self, every_n_steps: int, heatmap_every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise ConfigError(f"{self.name}.every_n_steps", "must be at least 1",
                              given=every_n_steps)
        if heatmap_every_n_steps < 1 or heatmap_every_n_steps % every_n_steps:
            raise ConfigError(
                f"{self.name}.heatmap_every_n_steps",
                f"must be a multiple of every_n_steps ({every_n_steps})",
                given=heatmap_every_n_steps,
            )
        self.every_n_steps = every_n_steps
        self.heatmap_every_n_steps = heatmap_every_n_steps
        self.rows: list[dict[str, Any]] = []
        self._sums = HeadSums(self.metrics)
        self._tap: Tap | None = None
        self._step: int | None = None

    @abstractmethod
    def observe(self, call: AttentionCall) -> None:
        """Add one attention call to `self._sums`."""

    def start_step(self, trainer: pl.Trainer, batch: Mapping[str, Any], step: int) -> None:
        """Called once per observed batch, before the forward pass."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._tap = Tap(watched_model(pl_module), self.observe)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step % self.every_n_steps:
            return
        assert self._tap is not None
        self._step = step
        self.start_step(trainer, batch, step)
        self._tap.open(batch.get("attention_mask") if isinstance(batch, Mapping) else None)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._step is None:
            return
        assert self._tap is not None
        self._tap.close()
        self._tap.require_calls()
        if trainer.global_step > self._step:  # the last micro-batch of this optimizer step
            self._flush(trainer, pl_module)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if self._tap is not None:
            self._tap.close()

    def _flush(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size > 1:
            self._sums.reduce(lambda sums: trainer.strategy.reduce(sums, reduce_op="sum"))
        step, means = self._step, self._sums.means()
        self._sums.clear()
        self._step = None
        assert step is not None
        if not trainer.is_global_zero:
            return
        if not means:
            raise TapError(f"{self.name}: attention ran, but nothing reached the monitor")
        order = {path: i for i, (path, _) in enumerate(watched_model(pl_module).named_modules())}
        sites = sorted(means, key=order.__getitem__)
        first = self.metrics[0]
        grid = HeadGrid(first, step, [means[site][first] for site in sites])
        log_scalars(trainer, grid)
        if step % self.heatmap_every_n_steps == 0:
            log_heatmap(trainer, grid)
        for layer, site in enumerate(sites):
            for head in range(len(means[site][first])):
                row = {name: float(means[site][name][head]) for name in self.metrics}
                self.rows.append({"step": step, "layer": layer, "head": head, **row})

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])


def watched_model(pl_module: torch.nn.Module) -> PreTrainedModel:
    """The transformers model in a LightningModule: itself, or the first one it holds.

    Raises:
        TapError: there is none.
    """
    for module in pl_module.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise TapError(f"{type(pl_module).__name__} holds no transformers model to watch")
