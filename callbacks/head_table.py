"""One long table of everything the head monitors saw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytorch_lightning as pl
import torch
import wandb
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import WandbLogger

from .head_monitor import HeadMonitor

KEYS = ["step", "layer", "head"]


class HeadTable(Callback):
    """At the end of training: `heads.parquet` in the run directory, and in a W&B artifact.

    The artifact holds a W&B table as well, as long as W&B takes one of this length.
    Columns: step, layer, head, then one per metric of the monitors that ran. A metric that was
    not observed at a step is null there.
    """

    FILE = "heads.parquet"

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        monitors = [c for c in trainer.callbacks if isinstance(c, HeadMonitor)]  # type: ignore[attr-defined]
        table = joined(monitors)
        if table.num_rows == 0:
            return
        file = Path(trainer.default_root_dir) / self.FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, file)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                _log_artifact(logger, table, file)


def joined(monitors: list[HeadMonitor]) -> pa.Table:
    """The monitors' observations as one table, a line per step, layer and head."""
    tables = [_long(monitor) for monitor in monitors if monitor.observations]
    if not tables:
        return pa.table({name: pa.array([], pa.int64()) for name in KEYS})
    table = tables[0]
    for other in tables[1:]:
        table = table.join(other, keys=KEYS, join_type="full outer")
    return table.sort_by([(key, "ascending") for key in KEYS])


def _long(monitor: HeadMonitor) -> pa.Table:
    steps, layers, heads = [], [], []
    for seen in monitor.observations:
        steps.append(np.full(sum(seen["heads"]), seen["step"]))
        layers.append(np.repeat(np.arange(len(seen["heads"])), seen["heads"]))
        heads += [np.arange(count) for count in seen["heads"]]
    columns = dict(zip(KEYS, map(np.concatenate, (steps, layers, heads)), strict=True))
    for name in monitor.metrics:
        figures = torch.cat([seen["metrics"][name] for seen in monitor.observations])
        columns[name] = pa.array(figures.numpy(), from_pandas=True)  # NaN becomes null
    return pa.table(columns)


def _log_artifact(logger: WandbLogger, table: pa.Table, file: Path) -> None:
    run = logger.experiment
    artifact = wandb.Artifact(f"heads-{run.id}", type="head-metrics")
    artifact.add_file(str(file))
    if table.num_rows <= wandb.Table.MAX_ARTIFACT_ROWS:  # a longer one would be cut off
        columns = table.to_pydict()
        data = [list(row) for row in zip(*columns.values(), strict=True)]
        artifact.add(wandb.Table(columns=list(columns), data=data), "heads")
    run.log_artifact(artifact)
