"""Training steps under Lightning, each in one of several variants, in one fit."""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import WandbLogger
from surgery.callbacks import AttentionStatistics

from benchmarks.observe.explicit import statistics
from benchmarks.observe.subject import Preset, batch, build, optimizer

ROWS = 64
# A multiple of any step count here: pictures are drawn at step 0, and not again.
NEVER = 10**9
PLAIN, WATCHED, PICTURED, ALL, EAGER, EXPLICIT = (
    "plain",
    "watched",
    "pictured",
    "all rows",
    "eager",
    "explicit map",
)
VARIANTS = (PLAIN, WATCHED, PICTURED, ALL, EAGER, EXPLICIT)


def watchers() -> dict[str, AttentionStatistics]:
    return {
        WATCHED: AttentionStatistics(1, NEVER, rows=ROWS),
        PICTURED: AttentionStatistics(1, 1, rows=ROWS),
        ALL: AttentionStatistics(1, NEVER, rows=None),
    }


class Trained(pl.LightningModule):
    """The model; a step computes attention as its variant says, and what it has to say of it."""

    def __init__(self, preset: Preset, length: int, schedule: Sequence[str]) -> None:
        super().__init__()
        self.model = build(preset, length, "sdpa")
        self.schedule = schedule
        self.seen: torch.Tensor | None = None

    def training_step(self, rows: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        variant = self.schedule[batch_idx]
        whole = variant == EXPLICIT
        self.model.set_attn_implementation("eager" if variant in (EAGER, EXPLICIT) else "sdpa")
        output = self.model(**rows, output_attentions=whole)
        if whole:
            ids = rows["input_ids"]
            self.seen = torch.stack([statistics(one, ids) for one in output.attentions])
        loss: torch.Tensor = output.loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer(self.model)


class InTurn(Callback):
    """Lets another callback see the steps of one variant alone."""

    def __init__(self, watcher: Callback, variant: str, schedule: Sequence[str]) -> None:
        self._watching = False
        for name in dir(Callback):
            if name.startswith("on_") and getattr(type(watcher), name) is not getattr(
                Callback, name
            ):
                hook = getattr(watcher, name)
                in_step = name.startswith(("on_train_batch", "on_before", "on_after"))
                setattr(self, name, partial(self._gated, name, hook) if in_step else hook)
        self._mine = [one == variant for one in schedule]

    def _gated(self, name: str, hook: Callable[..., Any], *arguments: Any) -> None:
        if name == "on_train_batch_start":
            self._watching = self._mine[arguments[3]]
        if self._watching:
            hook(*arguments)


@dataclass(frozen=True)
class Seconds:
    """Of one step: what passed, and what this process computed."""

    wall: float
    cpu: float


class Clock(Callback):
    """Seconds of each step, from the end of the last to its own end; the last of the callbacks."""

    def __init__(self) -> None:
        self.seconds: list[Seconds] = []
        self._last = (0.0, 0.0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last = (time.perf_counter(), time.process_time())

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        now = (time.perf_counter(), time.process_time())
        self.seconds.append(Seconds(now[0] - self._last[0], now[1] - self._last[1]))
        self._last = now


def fit(
    preset: Preset, length: int, schedule: Sequence[str], *, logged: bool = True
) -> list[Seconds]:
    """Train one step per entry of `schedule`; seconds of each.

    Args:
        logged: to W&B, offline, as runs are by default.
    """
    clock = Clock()
    chosen = {name: one for name, one in watchers().items() if name in schedule}
    turns = [InTurn(watcher, name, schedule) for name, watcher in chosen.items()]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger = WandbLogger(save_dir=folder, mode="offline") if logged else None
        if logger is not None:
            # Lightning 2.6 hands over anonymous=None, of which wandb warns at every start.
            logger._wandb_init.pop("anonymous", None)
        logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=len(schedule),
            max_epochs=1,
            logger=logger or False,
            callbacks=[*turns, clock],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=Path(folder),
        )
        module = Trained(preset, length, schedule)
        trainer.fit(module, _Rows(batch(length), len(schedule)))
        if logger is not None:
            logger.experiment.finish()
    for name, watcher in chosen.items():
        if len(watcher.observations) != list(schedule).count(name):
            raise RuntimeError(f"{name}: {len(watcher.observations)} steps were observed")
    if (EXPLICIT in schedule) != (module.seen is not None):
        raise RuntimeError("the explicit maps were not looked at")
    return clock.seconds


class _Rows:
    """The same batch, so many times; Lightning wants more than an iterator."""

    def __init__(self, rows: dict[str, torch.Tensor], count: int) -> None:
        self._rows, self._count = rows, count

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter([self._rows] * self._count)

    def __len__(self) -> int:
        return self._count
