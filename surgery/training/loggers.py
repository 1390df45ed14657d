"""Lightning loggers from `logger.*`: W&B, CSV and TensorBoard, all inside the run directory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from surgery.config.schema import LoggerConfig, LoggerKind, LoggerMode
from surgery.errors import ConfigError
from surgery.login import is_logged_in

_staging: dict[str, str] = {}


def check_loggers(cfg: LoggerConfig) -> None:
    """Refuse what would fail only after the model has been trained.

    Raises:
        ConfigError: online W&B without a login, or TensorBoard that is not installed.
    """
    if LoggerKind.wandb in cfg.kinds and cfg.mode is LoggerMode.online and not is_logged_in():
        raise ConfigError(
            "logger.mode",
            "Weights & Biases is not logged in on this machine",
            given="online",
            valid="offline, or `wandb login` (or WANDB_API_KEY) first",
        )
    if LoggerKind.tensorboard in cfg.kinds:
        try:
            import tensorboard  # noqa: F401  (seconds)
        except ImportError:
            raise ConfigError(
                "logger.kinds",
                "TensorBoard is not installed",
                given="tensorboard",
                valid='pip install "attention-surgery[tensorboard]", or wandb, csv',
            ) from None


def build_loggers(cfg: LoggerConfig, run_dir: Path, settings: dict[str, Any]) -> list[Logger]:
    """Build one logger per `logger.kinds`; `settings` becomes the W&B run's config."""
    loggers: list[Logger] = []
    for kind in cfg.kinds:
        if kind is LoggerKind.csv:
            loggers.append(CSVLogger(save_dir=run_dir, name="", version=""))
        elif kind is LoggerKind.tensorboard:
            loggers.append(TensorBoardLogger(save_dir=run_dir, name="tensorboard", version=""))
        else:
            loggers.append(_build_wandb_logger(cfg, run_dir, settings))
    return loggers


def _build_wandb_logger(cfg: LoggerConfig, run_dir: Path, settings: dict[str, Any]) -> WandbLogger:
    offline = cfg.mode is LoggerMode.offline
    if offline:
        os.environ.setdefault("WANDB_SILENT", "true")
    # Artifacts are staged in the run directory too; a home directory may be read-only. What the
    # user has set stays; what an earlier run of the same sweep has set does not.
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        if os.environ.get(name) == _staging.get(name):
            _staging[name] = str(run_dir.absolute() / "wandb" / "artifacts")
            os.environ[name] = _staging[name]
    logger = WandbLogger(
        save_dir=run_dir,
        project=cfg.project,
        name=cfg.name,
        entity=cfg.entity,
        group=cfg.group,
        tags=cfg.tags,
        offline=offline,
        config=settings,
    )
    # Lightning 2.6 hands over anonymous=None, of which wandb warns at every start.
    getattr(logger, "_wandb_init", {}).pop("anonymous", None)
    return logger


def list_wandb_runs(loggers: Sequence[Logger], *, started: bool = False) -> list[Any]:
    """List the W&B runs behind `loggers`; stand-ins that take anything except on rank zero.

    Args:
        started: only those that something was sent to; else they are started now.
    """
    found = [logger for logger in loggers if isinstance(logger, WandbLogger)]
    return [logger.experiment for logger in found if not started or logger.version is not None]


def finish_runs(loggers: Sequence[Logger], *, failed: bool = False) -> None:
    """End the W&B runs that were started; one that failed is marked so."""
    for run in list_wandb_runs(loggers, started=True):
        run.finish(exit_code=int(failed))
