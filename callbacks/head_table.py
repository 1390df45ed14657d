"""One long table of everything the head monitors saw."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytorch_lightning as pl
import wandb
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import WandbLogger

from .head_monitor import HeadMonitor


class HeadTable(Callback):
    """At the end of training: `heads.parquet` in the run directory, and a W&B table artifact.

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
        pq.write_table(table, Path(trainer.default_root_dir) / self.FILE)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                _log_artifact(logger, table)


def joined(monitors: list[HeadMonitor]) -> pa.Table:
    """The monitors' rows as one table, a line per step, layer and head."""
    metrics = [name for monitor in monitors for name in monitor.metrics]
    rows: dict[tuple[int, int, int], dict[str, float]] = {}
    for monitor in monitors:
        for row in monitor.rows:
            key = (row["step"], row["layer"], row["head"])
            rows.setdefault(key, {}).update({name: row[name] for name in monitor.metrics})
    keys = sorted(rows)
    columns: dict[str, list[float | int | None]] = {
        name: [key[i] for key in keys] for i, name in enumerate(("step", "layer", "head"))
    }
    for name in metrics:
        columns[name] = [rows[key].get(name) for key in keys]
    return pa.table(columns)


def _log_artifact(logger: WandbLogger, table: pa.Table) -> None:
    run = logger.experiment
    artifact = wandb.Artifact(f"heads-{run.id}", type="head-metrics")
    columns = table.to_pydict()
    data = [list(row) for row in zip(*columns.values(), strict=True)]
    artifact.add(wandb.Table(columns=list(columns), data=data), "heads")
    run.log_artifact(artifact)
