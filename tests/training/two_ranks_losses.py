"""Train on two gloo processes; write down what each computed and logged. For `two_ranks.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch.utils.data import DataLoader

from surgery.data.collate import IGNORED, Batch
from surgery.errors import SurgeryError
from surgery.training.curve import LossCurve
from surgery.training.module import SurgeryModule
from tests.training.making import operated, options, save_model
from tests.two_processes import fit_on_two

STEPS = 3


def make_batch(seed: int, rows: int, *, labelled: int = 9) -> Batch:
    ids = torch.randint(3, 60, (rows, 9), generator=torch.Generator().manual_seed(seed))
    place = torch.arange(9)
    return {"input_ids": ids, "labels": torch.where(place < labelled, ids, IGNORED)}


class OwnBatches(pl.LightningDataModule):
    """Processes get unlike batches; the second has a held-out window without any label."""

    def __init__(self, blind_step: int | None = None) -> None:
        super().__init__()
        self.blind_step = blind_step

    def train_dataloader(self) -> DataLoader[Batch]:
        rank = self.trainer.global_rank  # type: ignore[union-attr]
        labelled = [0 if rank == 1 and step == self.blind_step else 9 for step in range(STEPS)]
        batches = [make_batch(2 * i + rank, 2, labelled=n) for i, n in enumerate(labelled)]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Batch]:
        if self.trainer.global_rank == 0:  # type: ignore[union-attr]
            held_out = [make_batch(90, 1), make_batch(91, 2, labelled=4)]
        else:
            held_out = [make_batch(92, 3, labelled=1)]
        return DataLoader(held_out, batch_size=None)  # type: ignore[arg-type]


class WriteDown(Callback):
    """Each step's own loss, and what was logged; the model's weights once held out."""

    def __init__(self) -> None:
        self.own: list[float] = []
        self.logged: list[dict[str, float]] = []
        self.held_out: dict[str, Any] = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *args: Any
    ) -> None:
        self.own.append(outputs["loss"].item())
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        weights = {k: v.clone() for k, v in pl_module.model.state_dict().items()}
        self.held_out = {"loss": float(trainer.callback_metrics["val/loss"]), "weights": weights}


def fit(module: SurgeryModule, data: OwnBatches, root: Path, *callbacks: Callback) -> None:
    fit_on_two(module, root, *callbacks, data=data, max_steps=STEPS, num_sanity_val_steps=0)


class WriteResult(Callback):
    def __init__(self, write_down: WriteDown, curve: LossCurve) -> None:
        self.write_down, self.curve = write_down, curve

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        written = self.write_down
        known = {
            "own": written.own,
            "logged": written.logged,
            "held_out": written.held_out,
            "curve": self.curve.points,
        }
        torch.save(known, Path(trainer.default_root_dir) / f"rank{trainer.global_rank}.pt")


def write_refusal(module: SurgeryModule, root: Path) -> None:
    """Write down what a training step refuses, in each process, before it ends the training."""
    step = module.training_step

    def watched(batch: Batch, batch_idx: int) -> torch.Tensor:
        try:
            return step(batch, batch_idx)
        except SurgeryError as error:
            (root / f"refused{module.global_rank}.txt").write_text(str(error))
            torch.distributed.barrier()  # the first to end would have the other one killed
            raise

    module.training_step = watched  # type: ignore[method-assign]


def log_losses(root: Path) -> None:
    folder = save_model(root / "model")
    distilled = operated(folder, objective=options("objective", "distill", label_weight=0.5))
    write_down, curve = WriteDown(), LossCurve()
    fit(distilled, OwnBatches(), root, write_down, curve, WriteResult(write_down, curve))
    refusing = operated(folder)
    write_refusal(refusing, root)
    with pytest.raises(Exception, match="SurgeryError"):  # the launcher wraps it
        fit(refusing, OwnBatches(blind_step=1), root)
