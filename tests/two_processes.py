"""Trainings on two gloo processes, which a script forks: pytest's own process would not bear it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

ROOT = Path(__file__).parents[1]


def run_script(module: str, folder: Path) -> str:
    """Run `python -m module folder`; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", module, str(folder)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def fit_on_two(
    module: pl.LightningModule,
    root: Path,
    *callbacks: Callback,
    data: pl.LightningDataModule | None = None,
    **options: Any,
) -> None:
    """Train in two forks, quietly; `options` are the Trainer's."""
    pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_fork",  # one import of everything for both
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=root,
        callbacks=list(callbacks),
        **options,
    ).fit(module, datamodule=data)
