"""Lightning's Trainer from `trainer.*`, with the callbacks a run needs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from pytorch_lightning.callbacks import Callback, RichProgressBar
from pytorch_lightning.loggers import Logger

from surgery.console import is_terminal
from surgery.errors import ConfigError
from surgery.training.progress import PlainProgress


def build_callbacks(entries: dict[str, Any]) -> list[Callback]:
    """Instantiate `callbacks.*`; an entry set to ``null`` is left out.

    Raises:
        ConfigError: an entry that names no callback, or options it does not take.
    """
    callbacks = []
    for name, entry in entries.items():
        if entry is None:
            continue
        key = f"callbacks.{name}"
        if not isinstance(entry, dict) or "_target_" not in entry:
            raise ConfigError(key, "needs a _target_: the callback's dotted class name")
        try:
            callback = instantiate(entry)
        except (InstantiationException, ValueError, TypeError) as error:
            cause = error.__cause__ or error
            raise ConfigError(key, str(cause).splitlines()[0], given=entry) from None
        if not isinstance(callback, Callback):
            raise ConfigError(key, "is no Lightning callback", given=entry["_target_"])
        callbacks.append(callback)
    return callbacks


def build_trainer(
    options: dict[str, Any],
    *,
    run_dir: Path,
    callbacks: list[Callback],
    loggers: list[Logger],
    resumable_data: bool = True,
) -> pl.Trainer:
    """Raises: ConfigError, where Lightning refuses an option."""
    options = {name: value for name, value in options.items() if value is not None}
    callbacks = list(callbacks)
    if options.get("enable_progress_bar", True):
        callbacks.append(RichProgressBar(leave=True) if is_terminal() else PlainProgress())
        options["enable_progress_bar"] = is_terminal()
    # Said elsewhere, or not this run's business.
    for text in (".*tensorboardX.*", ".*litlogger.*", ".*isinstance.treespec.*"):
        warnings.filterwarnings("ignore", message=text)
    try:
        return pl.Trainer(
            **options,
            default_root_dir=run_dir,
            callbacks=callbacks,
            logger=loggers or False,
            # The data module's own sampler splits between ranks and resumes.
            use_distributed_sampler=not resumable_data,
        )
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        # Lightning's MisconfigurationException is a plain Exception: let the name decide.
        raise ConfigError("trainer", str(error).splitlines()[0]) from None
    except Exception as error:
        if type(error).__name__ != "MisconfigurationException":
            raise
        raise ConfigError("trainer", str(error).splitlines()[0]) from None
