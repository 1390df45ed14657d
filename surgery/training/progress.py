"""Training progress where there is no terminal: a plain line now and then."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from surgery.console import say


class PlainProgress(Callback):
    """Prints a line every tenth of the run, or every half minute, whichever comes first."""

    def __init__(self, lines: int = 10, seconds: float = 30.0) -> None:
        self.lines = lines
        self.seconds = seconds
        self._last_step = 0
        self._last_time = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last_step = trainer.global_step
        self._last_time = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        step = trainer.global_step
        if step == self._last_step:
            return
        total = trainer.estimated_stepping_batches
        due = total != float("inf") and step - self._last_step >= max(1, total // self.lines)
        now = time.monotonic()
        if due or step == total or now - self._last_time >= self.seconds:
            self._last_step, self._last_time = step, now
            metrics = {k: float(v) for k, v in trainer.progress_bar_metrics.items()}
            shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            say(f"  training: step {step}/{int(total) if total != float('inf') else '?'}  {shown}")
