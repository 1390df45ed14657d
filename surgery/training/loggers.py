"""Lightning loggers from `logger.*`: W&B, CSV and TensorBoard, all inside the run directory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from surgery.config.schema import LoggerConfig, LoggerKind, LoggerMode
from surgery.console import say
from surgery.errors import ConfigError
from surgery.login import is_logged_in
from surgery.training.wandb_options import WandbOptions, resolve_wandb_options

_staging: dict[str, str] = {}


def check_loggers(cfg: LoggerConfig) -> None:
    """Refuse what would fail only after the model has been trained.

    Raises:
        ConfigError: a mode that W&B does not have, a folder of W&B that cannot be written to,
            online W&B without a login, or TensorBoard that is not installed.
    """
    if LoggerKind.wandb in cfg.kinds:
        options = resolve_wandb_options(cfg)
        for line in options.lines:
            say(line)
        if options.mode is LoggerMode.online and not is_logged_in():
            key, _, given = options.mode_key.partition("=")
            raise ConfigError(
                key,
                "Weights & Biases is not logged in on this machine",
                given=given,
                valid="offline, disabled, or `wandb login` (or WANDB_API_KEY) first",
            )
        if options.folder is not None and options.mode is not LoggerMode.disabled:
            _check_writable(options.folder)
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


def _check_writable(folder: Path) -> None:
    """W&B itself would write into a temporary folder, without a word."""
    there = next(one for one in (folder, *folder.parents) if one.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ConfigError("WANDB_DIR", "cannot be written to", given=str(folder))


def build_loggers(cfg: LoggerConfig, run_dir: Path, settings: dict[str, Any]) -> list[Logger]:
    """Build one logger per `logger.kinds`, without W&B where its mode is `disabled`.

    Args:
        settings: what becomes the W&B run's config.
    """
    loggers: list[Logger] = []
    for kind in cfg.kinds:
        if kind is LoggerKind.csv:
            loggers.append(CSVLogger(save_dir=run_dir, name="", version=""))
        elif kind is LoggerKind.tensorboard:
            loggers.append(TensorBoardLogger(save_dir=run_dir, name="tensorboard", version=""))
        elif (options := resolve_wandb_options(cfg)).mode is not LoggerMode.disabled:
            loggers.append(_build_wandb_logger(options, run_dir, settings))
    return loggers


def _build_wandb_logger(
    options: WandbOptions, run_dir: Path, settings: dict[str, Any]
) -> WandbLogger:
    if options.mode is LoggerMode.offline:
        os.environ.setdefault("WANDB_SILENT", "true")
    folder = options.folder or run_dir.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    # Artifacts are staged there too; a home directory may be read-only. What the user has set
    # stays; what an earlier run of the same sweep has set does not.
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        if os.environ.get(name) == _staging.get(name):
            _staging[name] = str(folder / "wandb" / "artifacts")
            os.environ[name] = _staging[name]
    # Not Lightning's `offline`: it would set WANDB_MODE for all that this process starts later.
    logger = WandbLogger(
        save_dir=folder, mode=options.mode.value, config=settings, **dict(options.init)
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
