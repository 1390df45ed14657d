"""Loggers that are none of `pytorch_lightning`'s classes, and W&B that is switched off."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning.loggers.tensorboard
import pytorch_lightning.loggers.wandb
from pytorch_lightning.loggers import CSVLogger, Logger, WandbLogger
from surgery.callbacks import AttentionStatistics, HeadAlarms, HeadTable
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.callbacks.fitting import OwnModule, fit, unpadded
from tests.tiny_models import tiny_model, tokens
from tests.wandb_records import read_records


def load_again(module: Any, name: str) -> Any:
    """Load a module a second time: the same code, but other classes.

    That is what `lightning.pytorch` is to `pytorch_lightning`.
    """
    spec = importlib.util.spec_from_file_location(name, module.__file__)
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    return again


class Silent(Logger):
    """A user's own, which takes scalars."""

    name, version = "silent", 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


def watch(root: Path, loggers: list[Any]) -> None:
    fit(
        OwnModule(tiny_model("llama"), lr=0.1),
        [unpadded(tokens(2, 6, seed=i)) for i in range(2)],
        [
            AttentionStatistics(1, 1, metrics=["normalized_entropy"]),
            HeadAlarms(uniform=0.1, patience=1, action="alert"),
            HeadTable(),
        ],
        root,
        logger=loggers,
    )


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "staging"))


def test_the_other_naming_gets_pictures_artifacts_and_alerts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = load_again(pytorch_lightning.loggers.wandb, "other_wandb")
    board = load_again(pytorch_lightning.loggers.tensorboard, "other_tensorboard")
    wandb_logger = other.WandbLogger(save_dir=tmp_path, project="tests", mode="offline")
    assert not isinstance(wandb_logger, WandbLogger)
    watch(tmp_path, [wandb_logger, board.TensorBoardLogger(tmp_path, name="board", version="")])
    wandb_logger.experiment.finish()
    found = read_records(tmp_path)
    assert [one["alert"]["title"] for one in found if one["type"] == "alert"] == [
        "uniform at step 0"
    ]
    assert [one["artifact"]["type"] for one in found if one["type"] == "artifact"] == [
        "head-metrics"
    ]
    pictures = [
        one["history"]["item"]["trainer/global_step"]
        for one in found
        if one["type"] == "history"
        and "normalized_entropy/heads.filenames" in one["history"]["item"]
    ]
    assert pictures == [0, 1]
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert [image.step for image in events.Images("normalized_entropy/heads")] == [0, 1]
    out = capsys.readouterr().out
    assert out.count("does not take") == 1  # TensorBoard has no tables
    assert "TensorBoardLogger does not take tables; that of all heads is" in out


def test_what_a_logger_does_not_take_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watch(tmp_path, [Silent(), CSVLogger(tmp_path, name="", version="")])
    out = capsys.readouterr().out
    for name in ("Silent", "CSVLogger"):
        assert out.count(f"{name} does not take pictures of heads") == 1
        assert out.count(f"{name} does not take tables; that of all heads is {tmp_path}") == 1
    assert "action=alert needs logger=wandb; alarms are only printed" in out


def test_disabled_wandb_gets_nothing_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    logger = WandbLogger(save_dir=tmp_path, project="tests", mode="disabled")
    watch(tmp_path, [logger])
    assert logger.experiment.disabled
    logger.experiment.finish()
    assert {path.name for path in tmp_path.iterdir()} == {"heads.parquet", "temporary"}
    assert list((tmp_path / "temporary").iterdir()) == []
    out = capsys.readouterr().out
    assert "does not take" not in out
    assert "alarms are only printed" in out
