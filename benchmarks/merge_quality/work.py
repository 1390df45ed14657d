"""One cell: load, convert, heal, evaluate."""

from __future__ import annotations

import copy
import time
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from benchmarks.merge_quality.convert import convert
from benchmarks.merge_quality.evaluate import evaluate
from benchmarks.merge_quality.grid import ORIGINAL, Cell, kv_heads
from benchmarks.merge_quality.presets import HEADS, PRESETS
from benchmarks.shared import models, settings
from benchmarks.shared.heal import heal
from benchmarks.shared.settings import warmup_steps
from surgery.config.schema import Task
from surgery.data.module import TextData
from surgery.measure.loss import compute_mean_loss
from surgery.models.source import ModelSource


@dataclass(frozen=True)
class Work:
    """Measures cells, in this process or another.

    Attributes:
        plans: folder of the calibrated plans; those in it are used again.
    """

    preset: str
    models: Path
    plans: Path
    threads: int

    def __call__(self, cell: Cell) -> dict[str, Any]:
        """The record of `cell`. Raises: RefusedError."""
        warnings.filterwarnings("ignore")
        logging.disable_progress_bar()
        datasets.disable_progress_bars()
        torch.set_num_threads(self.threads)
        preset = PRESETS[self.preset]
        kind = preset.kinds[cell.kind]
        path = models.path_of(kind, cell.seed, self.models)
        steps = preset.healing_steps(cell.kind, cell.share)
        objective = cell.objective if steps else "lm"
        run = settings.run_config(
            path,
            preset,
            cell.seed,
            objective=objective,
            steps=max(1, steps),
            rate=preset.rates.get(cell.merge, 1.0) if cell.rate is None else cell.rate,
        )
        run.trainer["accelerator"] = "cpu"
        original, data = _original(path, self.preset), _text(path, self.preset, cell.seed)
        heads = kv_heads(cell.ratio, HEADS)
        seconds: dict[str, float] = {}

        started = time.perf_counter()
        model = original
        if cell.merge != ORIGINAL:
            windows = settings.calibration(data, preset.calibration_windows)
            kept = self.plans / f"{cell.kind}-{cell.seed}-{cell.merge}-{heads}"
            model = convert(original, cell.merge, heads, windows, kept)
            seconds["convert"] = time.perf_counter() - started
        if steps:
            started = time.perf_counter()
            student = copy.deepcopy(original) if model is original else model
            model = heal(student.requires_grad_(True), original, run, data)
            seconds["heal"] = time.perf_counter() - started
        started = time.perf_counter()
        figures = evaluate(model, original, settings.held_out(data, preset), preset.entropy_rows)
        if cell.rate is not None:
            figures["tuning_loss"] = compute_mean_loss(
                model,
                settings.tuning(data, preset),
                Task.causal_lm,
                total=preset.held_out_windows // preset.batch_size,
                label="tuning",
            )
        seconds["evaluate"] = time.perf_counter() - started
        return cell.to_json() | {
            "kv_heads": heads,
            **figures,
            "steps": steps,
            "tokens": preset.tokens(steps),
            "lr": run.optim.lr if steps else None,
            "warmup_steps": warmup_steps(steps) if steps else None,
            "weights": models.identity(kind, cell.seed, self.models),
            "seconds": seconds,
        }


@lru_cache(maxsize=4)
def _text(path: str, preset: str, seed: int) -> TextData:
    return settings.text(settings.run_config(path, PRESETS[preset], seed))


@lru_cache(maxsize=4)
def _original(path: str, preset: str) -> PreTrainedModel:
    run = settings.run_config(path, PRESETS[preset], seed=0)
    return ModelSource(run.model).load().requires_grad_(False)
