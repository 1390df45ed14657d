"""Checkpoints that are whole or not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io import TorchCheckpointIO

from surgery.files import write_whole


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its name, then renames it.

    Lightning writes into the system's temporary folder and moves the file: between two file systems
    that is a copy, and a run killed in it leaves a checkpoint that cannot be read.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        if "://" in str(path) or storage_options is not None:  # no local file
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with write_whole(Path(path)) as draft:
            torch.save(checkpoint, draft)
