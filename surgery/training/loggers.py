"""Lightning loggers from `logger.*`: W&B, CSV and TensorBoard, all inside the run directory."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from surgery.config.schema import LoggerConfig, LoggerKind, LoggerMode
from surgery.errors import ConfigError

_staging: dict[str, str] = {}


def check_loggers(cfg: LoggerConfig) -> None:
    """Refuse what would fail only after the model has been trained.

    Raises:
        ConfigError: online W&B without a login, or TensorBoard that is not installed.
    """
    if LoggerKind.wandb in cfg.kinds and cfg.mode is LoggerMode.online and not _logged_in():
        raise ConfigError(
            "logger.mode",
            "Weights & Biases is not logged in on this machine",
            given="online",
            valid="offline, or `wandb login` (or WANDB_API_KEY) first",
        )
    if LoggerKind.tensorboard in cfg.kinds:
        try:
            import tensorboard  # noqa: F401
        except ImportError:
            raise ConfigError(
                "logger.kinds",
                "TensorBoard is not installed",
                given="tensorboard",
                valid='pip install "attention-surgery[tensorboard]", or wandb, csv',
            ) from None


def _logged_in() -> bool:
    """Whether an API key is to be found where wandb looks for one, without asking the network."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    named = os.environ.get("NETRC")
    files = [Path(named)] if named else [Path.home() / name for name in (".netrc", "_netrc")]
    return any(_password(file.expanduser(), host) for file in files)


def _password(file: Path, host: str) -> str | None:
    try:
        login = netrc.netrc(str(file)).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return None
    return login[2] if login else None


def build_loggers(cfg: LoggerConfig, run_dir: Path, settings: dict[str, Any]) -> list[Logger]:
    """One logger per `logger.kinds`; `settings` becomes the W&B run's config."""
    loggers: list[Logger] = []
    for kind in cfg.kinds:
        if kind is LoggerKind.csv:
            loggers.append(CSVLogger(save_dir=run_dir, name="", version=""))
        elif kind is LoggerKind.tensorboard:
            loggers.append(TensorBoardLogger(save_dir=run_dir, name="tensorboard", version=""))
        else:
            loggers.append(_wandb(cfg, run_dir, settings))
    return loggers


def _wandb(cfg: LoggerConfig, run_dir: Path, settings: dict[str, Any]) -> WandbLogger:
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
