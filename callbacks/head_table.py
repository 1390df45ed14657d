"""One long table of everything that the head monitors observed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytorch_lightning as pl
import torch
import wandb
from pytorch_lightning.callbacks import Callback

from surgery.files import write_table

from .head_logging import find_wandb_run, is_off, say_unsent
from .head_monitor import HeadMonitor

KEYS = ["step", "layer", "head"]


class HeadTable(Callback):
    """Writes `heads.parquet` at the end of training, into the run directory and a W&B artifact.

    The artifact also has a W&B table, if W&B accepts one of this length. Columns: step, layer,
    head, then one per metric of the monitors that ran. A metric that was not observed at a step is
    null there.
    """

    FILE = "heads.parquet"

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        monitors = [c for c in trainer.callbacks if isinstance(c, HeadMonitor)]  # type: ignore[attr-defined]
        table = join_observations(monitors)
        if table.num_rows == 0:
            return
        file = Path(trainer.default_root_dir) / self.FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        write_table(file, table)
        for logger in trainer.loggers:
            run = find_wandb_run(logger)
            if run is not None:
                _log_artifact(run, table, file)
            elif not is_off(logger):
                say_unsent(trainer, logger, f"tables; that of all heads is {file}")


def join_observations(monitors: list[HeadMonitor]) -> pa.Table:
    """Join the observations of all monitors: one row per step, layer and head."""
    tables = [_make_long_table(monitor) for monitor in monitors if monitor.observations]
    if not tables:
        return pa.table({name: pa.array([], pa.int64()) for name in KEYS})
    table = tables[0]
    for other in tables[1:]:
        table = table.join(other, keys=KEYS, join_type="full outer")
    return table.sort_by([(key, "ascending") for key in KEYS])


def _make_long_table(monitor: HeadMonitor) -> pa.Table:
    steps, layers, heads = [], [], []
    for observation in monitor.observations:
        counts = observation["heads"]
        steps.append(np.full(sum(counts), observation["step"]))
        layers.append(np.repeat(np.arange(len(counts)), counts))
        heads += [np.arange(count) for count in counts]
    columns = dict(zip(KEYS, map(np.concatenate, (steps, layers, heads)), strict=True))
    for name in monitor.metrics:
        figures = torch.cat([one["metrics"][name] for one in monitor.observations])
        columns[name] = pa.array(figures.numpy(), from_pandas=True)  # NaN becomes null
    return pa.table(columns)


def _log_artifact(run: wandb.Run, table: pa.Table, file: Path) -> None:
    artifact = wandb.Artifact(f"heads-{run.id}", type="head-metrics")
    artifact.add_file(str(file))
    if table.num_rows <= wandb.Table.MAX_ARTIFACT_ROWS:  # W&B would cut off a longer table
        columns = table.to_pydict()
        data = [list(row) for row in zip(*columns.values(), strict=True)]
        artifact.add(wandb.Table(columns=list(columns), data=data), "heads")
    run.log_artifact(artifact)
