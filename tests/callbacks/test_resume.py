"""What was observed before a stop is still there after a resume, once."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from surgery.callbacks import AttentionStatistics, HeadImportance, HeadTable

from tests.callbacks.fitting import OwnModule, fit, unpadded
from tests.tiny_models import tiny_model, tokens

BATCHES = [unpadded(tokens(2, 6, seed=i)) for i in range(4)]


def monitors() -> list[AttentionStatistics | HeadImportance]:
    return [AttentionStatistics(2, 2, rows=3), HeadImportance(2, 2)]


def test_a_resumed_run_has_the_observations_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = monitors()
    fit(OwnModule(tiny_model("llama"), lr=0.2), BATCHES, whole, tmp_path / "whole", max_epochs=2)

    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(
        OwnModule(tiny_model("llama"), lr=0.2),
        BATCHES,
        [*monitors(), saving],
        tmp_path / "first",
        enable_checkpointing=True,
    )

    resumed, root = monitors(), tmp_path / "second"
    fit(
        OwnModule(tiny_model("llama", seed=9), lr=0.2),  # other weights: they come from the file
        BATCHES,
        [*resumed, HeadTable()],
        root,
        max_epochs=2,
        resume=tmp_path / "step=4.ckpt",
    )
    for one, other in zip(resumed, whole, strict=True):
        assert [seen["step"] for seen in one.observations] == [0, 2, 4, 6]
        for got, expected in zip(one.observations, other.observations, strict=True):
            torch.testing.assert_close(got["metrics"], expected["metrics"], equal_nan=True)
    assert pq.read_table(root / "heads.parquet")["step"].unique().to_pylist() == [0, 2, 4, 6]


def test_the_checkpoint_can_be_read_without_running_code(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, filename="x", every_n_train_steps=1)
    fit(
        OwnModule(tiny_model("llama")),
        BATCHES,
        [*monitors(), saving],
        tmp_path,
        enable_checkpointing=True,
    )
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)["callbacks"]
    assert len(state["HeadImportance"]["observations"]) == 2
