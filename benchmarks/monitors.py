"""The cost of watching: training steps with both head monitors against steps without.

`python -m benchmarks.monitors`. One fit of the embedded model on its own data, or of what overrides
say (`model.path=…`), with the W&B logger (offline) on. Every second step is observed, so each
observed step has a neighbour that is not: what drifts in the machine drifts in both. An observed
step costs `observed_ratio` times its neighbour on average, pictures included (one per four
observations, as by default); at a cadence of n steps the overhead is (observed_ratio - 1) / n.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from pathlib import Path
from statistics import mean, median
from typing import Any

import pytorch_lightning as pl
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import WandbLogger
from surgery.callbacks import AttentionStatistics, HeadImportance

import surgery.hydra  # noqa: F401
from benchmarks.results_file import keep
from surgery.config.validate import check_config
from surgery.data.module import TextData
from surgery.files import write_json
from surgery.models.source import ModelSource
from surgery.pipeline.train import build_module
from surgery.plan.make import make_plan

WARM_UP_STEPS = 6
DEFAULT_CADENCE = 25
HEATMAPS = 4


class Clock(Callback):
    """Seconds of each step, from the end of the last to its own end; the last of the callbacks."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        if trainer.global_step > WARM_UP_STEPS:
            self.seconds.append(now - self._last)
        self._last = now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--keep", type=Path, help="where the figures go, in place of results/")
    parser.add_argument("overrides", nargs="*", help="of a run: model.path=… data.seq_len=…")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    os.environ["WANDB_SILENT"] = "true"

    with initialize_config_module("surgery.conf", version_base="1.3"):
        given = ["run_dir=unused", "optim.lr=3e-3", "data.batch_size=8", *options.overrides]
        cfg = compose("config", overrides=given)
    OmegaConf.resolve(cfg)
    run = check_config(cfg)
    source = ModelSource(run.model)
    plan = make_plan(source.build_meta_model(), [], name=source.name)
    clock = Clock()
    monitors = [HeadImportance(2, 2 * HEATMAPS), AttentionStatistics(2, 2 * HEATMAPS)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_steps=WARM_UP_STEPS + 2 * options.pairs,
            callbacks=[*monitors, clock],
            logger=WandbLogger(save_dir=folder, mode="offline"),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=Path(folder),
        )
        data = TextData(run.data, source.load_tokenizer(), run.model.task, seed=0)
        trainer.fit(build_module(run, source, plan), datamodule=data)
        trainer.logger.experiment.finish()

    # Steps count from 0, and even ones are observed.
    observed, plain = clock.seconds[0::2], clock.seconds[1::2]
    ratio = mean(observed) / mean(plain)
    overhead = (ratio - 1) / DEFAULT_CADENCE
    print(f"observed / plain step: {ratio:.3f}; at one step in {DEFAULT_CADENCE}: {overhead:+.2%}")
    figures = {
        "what": "a training step with HeadImportance and AttentionStatistics / one without",
        "pairs": options.pairs,
        "batch_size": run.data.batch_size,
        "seq_len": run.data.seq_len,
        "rows": monitors[1].sampled_rows,
        "observed_ratio": ratio,
        "observed_ratio_of_medians": median(observed) / median(plain),
        "default_cadence": DEFAULT_CADENCE,
        "overhead_at_default_cadence": overhead,
        "overhead_of_the_demo": (ratio - 1) / 10,
        "observed_s": observed,
        "plain_s": plain,
    }
    if options.keep is None:
        keep("monitors", figures)
    else:
        options.keep.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.keep, figures)


if __name__ == "__main__":
    main()
