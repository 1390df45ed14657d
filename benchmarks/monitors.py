"""The cost of watching: training with both head monitors against training without.

`python -m benchmarks.monitors`. Pairs of fits alternate in one process, on the embedded model and
data, with the callbacks' own default cadence; each fit is timed from the start of its first counted
step to the end of its last. The figure is the median over pairs of with / without.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import pytorch_lightning as pl
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import Callback
from surgery.callbacks import AttentionEntropy, HeadImportance

import surgery.hydra  # noqa: F401
from benchmarks.results_file import keep
from surgery.config.validate import checked
from surgery.data.module import TextData
from surgery.models.source import ModelSource
from surgery.pipeline.train import build_module
from surgery.plan.make import make_plan

WARM_UP_STEPS = 5


class Clock(Callback):
    """Seconds from the end of the warm-up to the end of the fit."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._start = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == WARM_UP_STEPS:
            self._start = time.perf_counter()
        self.seconds = time.perf_counter() - self._start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=50, help="counted steps per fit")
    parser.add_argument("--every", type=int, default=25, help="cadence; the default callbacks' own")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")

    with initialize_config_module("surgery.conf", version_base="1.3"):
        cfg = compose("config", overrides=["run_dir=unused"])
    OmegaConf.resolve(cfg)
    run = checked(cfg)
    source = ModelSource(run.model)
    tokenizer = source.tokenizer()
    plan = make_plan(source.skeleton(), [], name=source.name)

    def fit(callbacks: list[Callback]) -> float:
        clock = Clock()
        with tempfile.TemporaryDirectory() as folder:
            trainer = pl.Trainer(
                max_steps=WARM_UP_STEPS + options.steps,
                callbacks=[*callbacks, clock],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=Path(folder),
            )
            data = TextData(run.data, tokenizer, run.model.task, seed=0)
            trainer.fit(build_module(run, source, plan), datamodule=data)
        return clock.seconds

    fit([])
    pairs = []
    for index in range(options.pairs):
        order = (False, True) if index % 2 == 0 else (True, False)
        seconds = {}
        for watched in order:
            monitors = [
                HeadImportance(options.every, 4 * options.every),
                AttentionEntropy(options.every, 4 * options.every),
            ]
            seconds[watched] = fit(list(monitors) if watched else [])
        pairs.append({"without_s": seconds[False], "with_s": seconds[True],
                      "ratio": seconds[True] / seconds[False]})  # fmt: skip
        print(f"pair {index + 1}: {pairs[-1]['ratio']:.4f}")
    keep("monitors", {
        "what": "training time with HeadImportance and AttentionEntropy / without",
        "steps": options.steps, "every_n_steps": options.every, "rows": 64,
        "batch_size": run.data.batch_size, "seq_len": run.data.seq_len,
        "median_ratio": median(pair["ratio"] for pair in pairs), "pairs": pairs,
    })  # fmt: skip


if __name__ == "__main__":
    main()
