"""A script, not a test: train on two gloo processes and write down what each observed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from surgery.callbacks import AttentionStatistics, HeadAlarms, HeadImportance, HeadTable
from torch.utils.data import DataLoader

from surgery.observe.head_sums import HeadSums
from tests.callbacks.fitting import Batch, OwnModule, padded
from tests.tiny_models import tiny_model, tokens
from tests.two_processes import fit_on_two

STEPS = 3


def batch(step: int, rank: int) -> Batch:
    """Ranks get rows of unlike lengths, and one of them fewer rows."""
    lengths = (9, 5, 7) if rank == 0 else (4, 8)
    return padded(tokens(len(lengths), 9, seed=2 * step + rank), *lengths)


def alarms() -> HeadAlarms:
    """They fire at the last step, so that all steps are there to be compared."""
    return HeadAlarms(uniform=0.1, patience=STEPS, action="stop")


class TwoRanks(OwnModule):
    def train_dataloader(self) -> DataLoader[Batch]:
        return DataLoader([batch(step, self.global_rank) for step in range(STEPS)], batch_size=None)


class WriteDown(Callback):
    """What this rank knows at the end, in a file of its own."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        monitors = [
            c for c in trainer.callbacks if isinstance(c, AttentionStatistics | HeadImportance)
        ]
        observed = {type(monitor).__name__: monitor.observations for monitor in monitors}
        judge = next(c for c in trainer.callbacks if isinstance(c, HeadAlarms))
        known = {
            "observed": observed,
            "means": unlike_sites(trainer.global_rank),
            "alarms": judge.alarms,
            "stop": trainer.should_stop,
        }
        torch.save(known, Path(trainer.default_root_dir) / f"rank{trainer.global_rank}.pt")


def unlike_sites(rank: int) -> dict[str, list[float]]:
    """Means where ranks saw unlike sites, in unlike order, and where one saw none at all."""
    one = torch.tensor(1.0)
    both, alone = HeadSums(("a",)), HeadSums(("a",))
    for site in ("x", "y") if rank == 0 else ("z", "y"):
        both.add(site, {"a": (torch.tensor([1.0, 2.0]) + rank, one)})
    if rank == 1:
        alone.add("w", {"a": (torch.tensor([3.0]), one)})
    both.gather()
    alone.gather()
    means = both.summarize() | alone.summarize()
    return {site: means[site]["a"].tolist() for site in means}


def main(root: Path) -> None:
    fit_on_two(
        TwoRanks(tiny_model("llama"), lr=0.1),
        root,
        HeadImportance(1, 1),
        AttentionStatistics(1, 1, rows=None),
        alarms(),
        HeadTable(),
        WriteDown(),
        max_epochs=1,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
