"""The project's own configuration, as every cell uses it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from typing import Protocol

from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

import surgery.hydra  # noqa: F401  (Hydra finds the groups)
from surgery.config.schema import RunConfig
from surgery.config.validate import check_config
from surgery.data.collate import Batch
from surgery.data.module import TextData
from surgery.models.source import ModelSource
from surgery.training.rate import compute_full_rate


class Windows(Protocol):
    """What a preset says of its text."""

    @property
    def seq_len(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def held_out_windows(self) -> int: ...


def warmup_steps(steps: int) -> int:
    """The default configuration's 10 of 100, in proportion; 2 at least, 10 at most."""
    return min(10, max(2, steps // 10))


def run_config(
    path: str,
    preset: Windows,
    seed: int,
    *,
    objective: str = "lm",
    steps: int = 1,
    rate: float = 1.0,
) -> RunConfig:
    """Healing for `steps` steps; nothing watched, logged, validated or saved on the way.

    Args:
        rate: learning rate as a multiple of the project's default.
    """
    overrides = [
        "run_dir=unused",
        f"model.path={path}",
        f"seed={seed}",
        f"objective={objective}",
        f"data.seq_len={preset.seq_len}",
        f"data.batch_size={preset.batch_size}",
        f"optim.warmup_steps={warmup_steps(steps)}",
        f"trainer.max_steps={steps}",
        "trainer.limit_val_batches=0",
        "trainer.enable_checkpointing=false",
        "trainer.enable_progress_bar=false",
        "logger=none",
        "trainer.precision=bf16-mixed",
    ]
    run = copy.deepcopy(_composed(tuple(overrides)))
    run.optim.lr = rate * compute_full_rate(ModelSource(run.model).load_config())
    return run


@lru_cache(maxsize=32)
def _composed(overrides: tuple[str, ...]) -> RunConfig:
    with initialize_config_module("surgery.conf", version_base="1.3"):
        cfg = compose("config", overrides=list(overrides))
    OmegaConf.resolve(cfg)
    return check_config(cfg)


def text(run: RunConfig) -> TextData:
    """The standard library, in the order of the run's seed."""
    data = TextData(run.data, ModelSource(run.model).load_tokenizer(), run.model.task, run.seed)
    data.setup()
    return data


def calibration(data: TextData, windows: int) -> Iterator[Batch]:
    """{"input_ids": [B, S]} of the training text: the first windows that healing will see too."""
    for batch in islice(data.train_dataloader(), windows // data.cfg.batch_size):
        yield {"input_ids": batch["input_ids"]}


def held_out(data: TextData, preset: Windows) -> Iterator[Batch]:
    """The same windows for every model, seed and cell."""
    return data.load_held_out_batches(preset.held_out_windows, preset.batch_size)


def tuning(data: TextData, preset: Windows) -> Iterator[Batch]:
    """As many other windows of the same files, to choose options by; no figure comes from them.

    Raises:
        ValueError: fewer are there.
    """
    windows = preset.held_out_windows
    if data.held_out_size < 2 * windows:
        raise ValueError(f"{data.held_out_size} held-out windows, {2 * windows} are needed")
    batches = data.load_held_out_batches(2 * windows, preset.batch_size)
    return islice(batches, math.ceil(windows / preset.batch_size), None)
