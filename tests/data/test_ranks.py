"""Two processes training together see different windows, and resume as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from tests.data.making import all_rows, documents, text_data, write_texts
from tests.data.watching import Witness, every_step, watch


class WriteSeen(Callback):
    """Each process's windows as a file, for the parent to read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Witness)
        path = self.folder / f"{trainer.global_rank}.json"
        path.write_text(json.dumps(pl_module.seen))


@pytest.mark.parametrize("streaming", ["never", "always"])
def test_ranks_share_the_windows(tmp_path: Path, streaming: str) -> None:
    path = write_texts(tmp_path / "a.jsonl", documents(90))
    fields: dict[str, Any] = {"seq_len": 10, "batch_size": 3, "val_path": path}
    rows = [row["input_ids"][:3] for row in all_rows(text_data(path, **fields))]
    epoch = len(rows) // 2 // 3
    steps = epoch if streaming == "always" else epoch + 2

    def seen(name: str, **options: Any) -> list[list[Any]]:
        folder = tmp_path / name
        folder.mkdir()
        data = text_data(path, streaming=streaming, shuffle_buffer=9, **fields)
        watch(
            data,
            tmp_path,
            strategy="ddp_fork",
            devices=2,
            max_steps=steps,
            **options,
            callbacks=[WriteSeen(folder), every_step(folder, every_n_train_steps=2)],
        )
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]

    straight = seen("straight")
    one, other = ([row for batch in batches[:epoch] for row in batch] for batches in straight)
    assert len(one) == len(other) == 3 * epoch
    rest = [list(row) for row in rows]
    for row in one + other:  # each window is somebody's, and nobody's twice
        rest.remove(row)
    assert len(rest) == len(rows) - 6 * epoch
    resumed = seen("resumed", resume=tmp_path / "straight" / "step-2.ckpt")
    assert resumed == [batches[2:] for batches in straight]
