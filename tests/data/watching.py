"""The smallest real training there is: it writes down which windows it was given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint

from surgery.data.module import TextData
from surgery.training.trainer import build_trainer


class Witness(pl.LightningModule):
    """One weight.

    Attributes:
        seen: the first tokens of every row of every training batch.
        batches: by optimizer step, how many batches had been seen by then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[list[int]]] = []
        self.batches: dict[int, int] = {}

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        self.seen.append(batch["input_ids"][:, :3].tolist())
        return (self.weight * batch["input_ids"].float().mean()).sum()

    def on_train_batch_end(self, *args: Any) -> None:
        self.batches.setdefault(self.global_step, len(self.seen))

    def validation_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
        self.log("val/loss", self.weight.sum())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # As every schedule does; Lightning asks for the data then, long before it trains.
        assert self.trainer.estimated_stepping_batches
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def every_step(folder: Path, **options: Any) -> ModelCheckpoint:
    """Keeps a checkpoint per optimizer step: step-1.ckpt, step-2.ckpt, …"""
    options = {"every_n_train_steps": 1, "save_top_k": -1, **options}
    return ModelCheckpoint(folder, "step-{step}", auto_insert_metric_name=False, **options)


def watch(
    data: TextData,
    run_dir: Path,
    *,
    callbacks: list[Callback] | None = None,
    resume: Path | None = None,
    **options: Any,
) -> tuple[Witness, pl.Trainer]:
    """Fit a `Witness`, as the pipeline fits a model."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": bool(callbacks),
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
    }
    trainer = build_trainer(quiet | options, run_dir=run_dir, callbacks=callbacks or [], loggers=[])
    module = Witness()
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return module, trainer
