"""`logger.*`: refused where it could only fail after the training, else in the run directory."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from surgery.config.schema import LoggerConfig
from surgery.errors import ConfigError
from surgery.training.loggers import build_loggers, check_loggers
from surgery.training.module import parse_section
from surgery.training.wandb_options import DISABLED, VARIABLES, resolve_wandb_options
from tests.training.making import options

HOST = "api.wandb.ai"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home nobody has logged in from."""
    for name in ("NETRC", *(one for one in os.environ if one.startswith("WANDB_"))):
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


def _build(run_dir: Path, **fields: Any) -> WandbLogger:
    (logger,) = build_loggers(_logger("wandb", **fields), run_dir, {})
    assert isinstance(logger, WandbLogger)
    return logger


OWN = {"project": "p", "name": "n", "entity": "e", "group": "g", "tags": ["t", "u"], "notes": "no"}


@pytest.mark.parametrize("key", OWN)
def test_a_key_wins_over_its_variable_and_this_over_the_default(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    default = {"project": "attention-surgery"}
    assert _build(tmp_path)._wandb_init.get(key) == default.get(key)
    monkeypatch.setenv(VARIABLES[key], "a, b")
    assert _build(tmp_path)._wandb_init[key] == (["a", "b"] if key == "tags" else "a, b")
    check_loggers(_logger("wandb"))
    assert capsys.readouterr().out == ""
    assert _build(tmp_path, **{key: OWN[key]})._wandb_init[key] == OWN[key]
    check_loggers(_logger("wandb", **{key: OWN[key]}))
    said = capsys.readouterr().out
    assert f"overrules {VARIABLES[key]}=a, b" in said
    assert said.count("\n") == 1
    assert _build(tmp_path, tags=[])._wandb_init["tags"] == []  # none, and not the variable's


@pytest.mark.parametrize(
    ("environment", "key", "mode"),
    [
        ({}, None, "offline"),
        ({"WANDB_MODE": "disabled"}, None, "disabled"),
        ({"WANDB_MODE": "online"}, None, "online"),
        ({"WANDB_MODE": "run"}, None, "online"),
        ({"WANDB_MODE": "dryrun"}, None, "offline"),
        ({DISABLED: "true"}, None, "disabled"),
        ({DISABLED: "1", "WANDB_MODE": "online"}, None, "disabled"),
        ({DISABLED: "false"}, None, "offline"),
        ({"WANDB_MODE": "disabled"}, "offline", "offline"),
        ({DISABLED: "true"}, "offline", "offline"),
        ({"WANDB_MODE": "online"}, "disabled", "disabled"),
    ],
)
def test_the_mode(
    environment: dict[str, str],
    key: str | None,
    mode: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    cfg = _logger("wandb", mode=key)
    check_loggers(cfg)
    said = capsys.readouterr().out
    loggers = build_loggers(cfg, tmp_path, {})
    if mode == "disabled":
        assert loggers == []
        assert "writes nothing" in said
    else:
        assert loggers[0]._wandb_init["mode"] == mode  # type: ignore[attr-defined]
    overruled = key is not None
    assert all(
        (f"overrules {name}={value}" in said) is overruled for name, value in environment.items()
    )
    assert (said == "") is (not overruled and mode != "disabled")
    assert os.environ.get("WANDB_MODE") == environment.get("WANDB_MODE")


def test_the_mode_that_wandbs_own_command_keeps(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`wandb disabled` writes it into a file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb/settings").write_text("[default]\nmode = disabled\n")
    assert build_loggers(_logger("wandb"), tmp_path, {}) == []
    assert resolve_wandb_options(_logger("wandb", mode="offline")).mode.value == "offline"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert resolve_wandb_options(_logger("wandb")).mode.value == "offline"


def test_a_mode_that_wandb_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "off")
    with pytest.raises(ConfigError) as caught:
        check_loggers(_logger("wandb"))
    assert (caught.value.key, caught.value.given) == ("WANDB_MODE", "off")
    assert "disabled" in str(caught.value.valid)
    check_loggers(_logger("csv"))  # nothing there asks W&B


def test_online_by_the_environment_needs_a_login_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(ConfigError) as caught:
        check_loggers(_logger("wandb"))
    assert (caught.value.key, caught.value.given) == ("WANDB_MODE", "online")


def test_wandbs_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside the run directory if the user says so; W&B itself would fall back to /tmp."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "deep" / "below"))
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    check_loggers(_logger("wandb"))
    logger = _build(run_dir)
    logger.log_metrics({"loss": 1.0}, step=1)
    logger.experiment.finish()
    assert list((tmp_path / "deep/below/wandb").glob("offline-run-*/run-*.wandb"))
    assert list(run_dir.iterdir()) == []
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "file" / "below"))
    with pytest.raises(ConfigError, match="WANDB_DIR: cannot be written to"):
        check_loggers(_logger("wandb"))
