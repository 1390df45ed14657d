"""Training progress: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from surgery.console import Steps, say, track_progress


class BarProgress(Callback):
    """One bar over the optimizer steps of the whole run, with the latest loss beside it.

    A validation has a line of its own below it.

    (Lightning's own bars count the batches of an epoch, which a run of so many steps never ends.)
    """

    def __init__(self) -> None:
        self._bar: AbstractContextManager[Steps] | None = None
        self._steps: Steps | None = None
        self._validation: tuple[AbstractContextManager[Steps], Steps] | None = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        bar = track_progress("held-out loss", _count_validation_batches(trainer))
        self._validation = (bar, bar.__enter__())

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        if self._validation is not None:
            self._validation[1].advance()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close_validation()

    def _close_validation(self) -> None:
        if self._validation is not None:
            self._validation[0].__exit__(None, None, None)
        self._validation = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._bar = track_progress("training", _get_total(trainer))
        self._steps = self._bar.__enter__()
        self._steps.advance(trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        if self._steps is None or trainer.global_step == self._steps.done:
            return
        self._steps.describe(f"training  {_format_metrics(trainer)}")
        self._steps.advance(trainer.global_step - self._steps.done)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._close()

    def _close(self) -> None:
        self._close_validation()
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
        self._bar = self._steps = None


class PlainProgress(Callback):
    """Prints a line every tenth of the run, or every half minute, whichever comes first.

    A validation that takes longer says every half minute how far it is.
    """

    def __init__(self, lines: int = 10, seconds: float = 30.0) -> None:
        self.lines = lines
        self.seconds = seconds
        self._last_step = 0
        self._last_time = 0.0
        self._validated = 0
        self._last_validation_time = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last_step = trainer.global_step
        self._last_time = time.monotonic()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validated, self._last_validation_time = 0, time.monotonic()

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        self._validated += 1
        now, total = time.monotonic(), _count_validation_batches(trainer)
        if now - self._last_validation_time >= self.seconds:
            self._last_validation_time = now
            of = f" of {total}" if total is not None else ""
            say(f"  held-out loss: {self._validated}{of} batches")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        step, total, now = trainer.global_step, _get_total(trainer), time.monotonic()
        if step == self._last_step:
            return
        due = total is not None and step - self._last_step >= max(1, total // self.lines)
        if due or step == total or now - self._last_time >= self.seconds:
            self._last_step, self._last_time = step, now
            of = f"/{total}" if total is not None else ""
            say(f"  training: step {step}{of}  {_format_metrics(trainer)}")


def _get_total(trainer: pl.Trainer) -> int | None:
    steps = trainer.estimated_stepping_batches
    return int(steps) if steps != float("inf") else None


def _count_validation_batches(trainer: pl.Trainer) -> int | None:
    total = sum(trainer.num_val_batches)
    return int(total) if total != float("inf") else None


def _format_metrics(trainer: pl.Trainer) -> str:
    metrics = trainer.progress_bar_metrics.items()
    return "  ".join(f"{name} {float(value):.4f}" for name, value in metrics)
