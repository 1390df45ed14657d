"""Training tiny models with Lightning, as a user's own code would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

Batch = dict[str, torch.Tensor]


class OwnModule(pl.LightningModule):
    """A LightningModule that knows nothing of this project: it holds a model, under any name."""

    def __init__(self, net: PreTrainedModel, lr: float = 0.0) -> None:
        super().__init__()
        self.net = net
        self.lr = lr

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        return self.net(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def fit(
    module: pl.LightningModule,
    batches: list[Any],
    callbacks: list[Callback],
    root: Path,
    *,
    resume: Path | None = None,
    **options: Any,
) -> pl.Trainer:
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    trainer = pl.Trainer(default_root_dir=root, callbacks=callbacks, **(quiet | options))
    trainer.fit(module, DataLoader(batches, batch_size=None), ckpt_path=resume)
    return trainer


def by_layer(observation: Any, metric: str) -> list[torch.Tensor]:
    """The figures of one observation: [H] for each layer."""
    return list(observation["metrics"][metric].split(observation["heads"]))


def padded(ids: torch.Tensor, *lengths: int) -> Batch:
    """A batch whose rows are cut to `lengths`: mask and labels agree."""
    mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
    return {
        "input_ids": ids.masked_fill(mask == 0, 0),
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
    }


def unpadded(ids: torch.Tensor) -> Batch:
    return {"input_ids": ids, "labels": ids}
