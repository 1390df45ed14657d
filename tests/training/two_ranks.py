"""A script, not a test: train on two gloo processes; write down what each knows at the end.

The first training closes heads, the next ones log losses, the last keeps its best weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from tests.training.making import operated, save_model, small_data
from tests.training.two_ranks_best import keep_best
from tests.training.two_ranks_losses import log_losses
from tests.two_processes import fit_on_two


class WriteDown(Callback):
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        known = {
            "decision": pl_module.decision.state_dict(),
            "weights": pl_module.model.state_dict(),
        }
        torch.save(known, Path(trainer.default_root_dir) / f"rank{trainer.global_rank}.pt")


def close_heads(root: Path) -> None:
    module = operated(
        save_model(root / "model"),
        attention={},
        deferred={
            "operation": {
                "operation": "prune_heads",
                "amount": 0.5,
                "estimator": "gate_gradient",
                "cut": "queries",
                "scope": "global",
                "schedule": "iterative",
                "rounds": 2,
                "until": 1.0,
            },
            "importance": {"objective": "lm", "windows": 4, "batch_size": 2, "memory_windows": 8},
            "seed": 0,
            "native": False,
        },
    )
    fit_on_two(module, root, WriteDown(), data=small_data(root), max_steps=4, limit_val_batches=0)


if __name__ == "__main__":
    close_heads(Path(sys.argv[1]) / "heads")
    log_losses(Path(sys.argv[1]) / "losses")
    keep_best(Path(sys.argv[1]) / "best")
