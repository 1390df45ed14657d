"""`logger.*`: refused where it could only fail after the training, else in the run directory."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from surgery.config.schema import LoggerConfig
from surgery.errors import ConfigError
from surgery.training.loggers import build_loggers, check_loggers
from surgery.training.module import parse_section
from tests.training.making import options

HOST = "api.wandb.ai"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home nobody has logged in from."""
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


def _logger(group: str, /, **fields: Any) -> LoggerConfig:
    cfg = parse_section(LoggerConfig, options("logger", group, **fields))
    assert isinstance(cfg, LoggerConfig)
    return cfg


def _login(path: Path, host: str, key: str = "0" * 40) -> None:
    path.write_text(f"machine {host}\n  login user\n  password {key}\n")
    path.chmod(0o600)


def _refused(**fields: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        check_loggers(_logger("wandb", mode="online", **fields))
    return caught.value


def test_online_without_a_login_is_refused() -> None:
    error = _refused()
    assert (error.key, error.given) == ("logger.mode", "online")
    assert "WANDB_API_KEY" in str(error.valid)


def test_an_empty_or_broken_netrc_is_no_login(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = home / "netrc"
    monkeypatch.setenv("NETRC", str(path))
    assert _refused()
    for content in ("", "machine\n", f"machine {HOST}\n", "machine example.org password x\n"):
        path.write_text(content)
        assert _refused()
    monkeypatch.setenv("WANDB_API_KEY", "")
    assert _refused()


@pytest.mark.parametrize("name", [".netrc", "_netrc", "elsewhere"])
def test_a_login_file_is_found(home: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    _login(home / name, HOST)
    if name == "elsewhere":
        monkeypatch.setenv("NETRC", "~/elsewhere")
    check_loggers(_logger("wandb", mode="online"))
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8443")
    assert _refused()
    _login(home / name, "wandb.example.org:8443")
    check_loggers(_logger("wandb", mode="online"))


def test_a_key_in_the_environment_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    check_loggers(_logger("wandb", mode="online"))


@pytest.mark.parametrize("name", ["wandb", "csv", "tensorboard", "none", "all"])
def test_offline_needs_no_login(name: str) -> None:
    check_loggers(_logger(name))
    check_loggers(_logger("csv", mode="online"))


def test_each_kind_writes_into_the_run_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    loggers = build_loggers(_logger("all", name="mine"), run_dir, {"optim": {"lr": 0.5}})
    assert [type(logger) for logger in loggers] == [WandbLogger, CSVLogger, TensorBoardLogger]
    for logger in loggers:
        logger.log_metrics({"loss": 1.25}, step=3)
        logger.save()
    wandb_logger = loggers[0]
    assert isinstance(wandb_logger, WandbLogger)
    assert wandb_logger.experiment.config["optim"] == {"lr": 0.5}
    assert wandb_logger.experiment.name == "mine"
    wandb_logger.experiment.finish()
    with (run_dir / "metrics.csv").open() as file:
        assert list(csv.DictReader(file)) == [{"loss": "1.25", "step": "3"}]
    assert list((run_dir / "tensorboard").glob("events.out.tfevents.*"))
    assert list((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))
    assert {path.name for path in tmp_path.iterdir()} == {"run", "home"}
    assert build_loggers(_logger("none"), run_dir, {}) == []
