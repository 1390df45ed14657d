"""Train on two gloo processes and keep the best weights. For `two_ranks.py`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from surgery.training.best_weights import BestWeights, FirstAndLastValidation
from tests.training.making import operated, options, save_model, small_data
from tests.two_processes import fit_on_two

WINDOWS, STEPS = 4, 3


class WriteBest(Callback):
    """What each process knows at the end, and the weights that it gets back."""

    def __init__(self, best: BestWeights) -> None:
        self.best = best
        self.seen: dict[int, Any] = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        weights = {k: v.clone() for k, v in pl_module.model.state_dict().items()}
        self.seen[trainer.global_step] = weights

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        trainer.strategy.barrier()
        self.best.restore_(pl_module.model)
        known = {
            "evaluations": [tuple(one) for one in self.best.evaluations],
            "best": tuple(self.best.best or ()),
            "seen": self.seen,
            "weights": pl_module.model.state_dict(),
        }
        torch.save(known, Path(trainer.default_root_dir) / f"rank{trainer.global_rank}.pt")


def keep_best(root: Path) -> None:
    folder = save_model(root / "model")
    # Only the first process knows the rate.
    rate = 9.0 if int(os.environ.get("LOCAL_RANK", "0")) else 0.3
    module = operated(folder, optim=options("optim", "adamw", lr=rate, warmup_steps=1))
    best = BestWeights(root / "best.safetensors")
    data = small_data(root)
    data.validation_windows = WINDOWS
    fit_on_two(
        module,
        root,
        best,
        FirstAndLastValidation(best, 1),
        WriteBest(best),
        data=data,
        max_steps=STEPS,
        num_sanity_val_steps=0,
        val_check_interval=1,
        check_val_every_n_epoch=None,
    )
