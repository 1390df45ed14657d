"""One long table of everything that the head monitors observed."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytorch_lightning as pl
import torch
import wandb
from pytorch_lightning.callbacks import Callback

from surgery.console import say
from surgery.errors import ConfigError
from surgery.files import write_table

from .head_logging import find_wandb_run, is_off, say_unsent
from .head_monitor import HeadMonitor

KEYS = ["step", "layer", "head"]
# In the metadata of the file: the run that wrote it.
_RUN = "surgery.run"


class HeadTable(Callback):
    """Writes a table of heads at the end of training, as parquet and as a W&B artifact.

    The artifact also has a W&B table, if W&B accepts one of this length. Columns: step, layer,
    head, then one per metric of the monitors that ran. A metric that was not observed at a step is
    null there.

    Args:
        path: the file; what it held before is replaced, and a line says so. ``None``:
            `heads.parquet` in the trainer's log directory (of its first logger; without one its
            `default_root_dir`). If another run has left one there, `heads-2.parquet` and so on.

    Attributes:
        heads_file: the table that the last training has written; ``None`` if it has written none.

    Raises:
        ConfigError: `path` is no path of a file.
    """

    name = "head_table"
    FILE = "heads.parquet"

    def __init__(self, path: str | Path | None = None) -> None:
        if path is not None and (not isinstance(path, str | Path) or Path(path).is_dir()):
            raise ConfigError(
                f"{self.name}.path",
                "must be a file to write",
                given=path,
                valid="such as runs/heads.parquet, or null for the trainer's log directory",
            )
        self.path = None if path is None else Path(path)
        self.heads_file: Path | None = None
        # A resumed run keeps it, and so knows its own table.
        self._run = uuid.uuid4().hex

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.heads_file = None
        if self.path is None or not trainer.is_global_zero:
            return
        problem = "cannot be written to"  # better now than after the training
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"{problem}: {error.strerror}"
        if not os.access(self.path.parent, os.W_OK) or not self.path.parent.is_dir():
            raise ConfigError(f"{self.name}.path", problem, given=self.path) from None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = trainer.log_dir  # all processes have to ask
        if not trainer.is_global_zero:
            return
        monitors = [c for c in trainer.callbacks if isinstance(c, HeadMonitor)]  # type: ignore[attr-defined]
        table = join_observations(monitors)
        if table.num_rows == 0:
            return
        file = self._choose_file(Path(folder or trainer.default_root_dir))
        file.parent.mkdir(parents=True, exist_ok=True)
        write_table(file, table.replace_schema_metadata({_RUN: self._run}))
        self.heads_file = file
        for logger in trainer.loggers:
            run = find_wandb_run(logger)
            if run is not None:
                _log_artifact(run, table, file)
            elif not is_off(logger):
                say_unsent(trainer, logger, f"tables; that of all heads is {file}")

    def _choose_file(self, folder: Path) -> Path:
        if self.path is not None:
            if self._is_foreign(self.path):
                say(f"{self.name}: {self.path} was there before, and is replaced")
            return self.path
        wanted = file = folder / self.FILE
        number = 1
        while self._is_foreign(file):
            number += 1
            file = wanted.with_stem(f"{wanted.stem}-{number}")
        if file != wanted:
            say(f"{self.name}: {wanted} is another run's, so this is {file}")
        return file

    def _is_foreign(self, file: Path) -> bool:
        """Whether there is a file that this run has not written."""
        if not file.exists():
            return False
        try:
            known = pq.read_schema(file).metadata or {}
        except (OSError, pa.ArrowException):
            return True
        return known.get(_RUN.encode()) != self._run.encode()

    def state_dict(self) -> dict[str, Any]:
        return {"run": self._run}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._run = state_dict["run"]


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
