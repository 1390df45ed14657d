"""Lightning's Trainer from `trainer.*`, with the callbacks a run needs."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from lightning_fabric.plugins.io import TorchCheckpointIO
from pytorch_lightning.callbacks import Callback, LearningRateMonitor
from pytorch_lightning.loggers import Logger
from pytorch_lightning.profilers import (
    AdvancedProfiler,
    Profiler,
    PyTorchProfiler,
    SimpleProfiler,
)

from surgery.console import is_terminal, say
from surgery.errors import ConfigError, get_first_line
from surgery.signals import handle_signals_again
from surgery.training.checkpoint_file import WholeCheckpointIO
from surgery.training.progress import BarProgress, PlainProgress

PROFILE = "profile"  # Lightning puts the stage before it, and the process behind


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
            problem = " ".join(str(error.__cause__ or error).split())
            raise ConfigError(
                key, problem, given=entry, valid=_list_options(entry, problem)
            ) from None
        if not isinstance(callback, Callback):
            raise ConfigError(key, "must be a Lightning callback", given=entry["_target_"])
        callbacks.append(callback)
    return callbacks


def _list_options(entry: dict[str, Any], problem: str) -> list[str] | None:
    """List what the callback takes, where it complains of something else."""
    if "unexpected keyword argument" not in problem:
        return None
    target = get_object(entry["_target_"])
    return [name for name in inspect.signature(target).parameters if name not in ("args", "kwargs")]


def build_trainer(
    options: dict[str, Any],
    *,
    run_dir: Path,
    callbacks: list[Callback],
    loggers: list[Logger],
) -> pl.Trainer:
    """Raises: ConfigError, where Lightning refuses an option, or would fail on it much later."""
    options = {name: value for name, value in options.items() if value is not None}
    for name, least in {"accumulate_grad_batches": 1, "log_every_n_steps": 0}.items():
        value = options.get(name, least)
        if type(value) is not int or value < least:
            valid = f"a whole number from {least}"
            raise ConfigError(f"trainer.{name}", f"must be {valid}", given=value, valid=valid)
    if not loggers:  # it refuses to run where nothing is logged
        callbacks = [c for c in callbacks if not isinstance(c, LearningRateMonitor)]
    callbacks = [*callbacks, KeepSignals()]
    if options.get("enable_progress_bar", True):
        callbacks.append(BarProgress() if is_terminal() else PlainProgress())
    options["enable_progress_bar"] = False  # Lightning's own
    # The user has set the devices, so what Lightning prints of them is left out.
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    # Printed elsewhere, or not about this run. The data module knows where to continue; Lightning
    # asks the loader.
    for text in ("tensorboardX", "litlogger", "isinstance.treespec", "dataloader is not resumable"):
        warnings.filterwarnings("ignore", message=f".*{text}.*")
    if isinstance(options.get("profiler"), str):
        options["profiler"] = _build_profiler(options["profiler"], run_dir)
    try:
        trainer = pl.Trainer(
            **options,
            default_root_dir=run_dir,
            callbacks=callbacks,
            logger=loggers or False,
            # The data module's own sampler splits between ranks and resumes.
            use_distributed_sampler=False,
        )
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        # Lightning's MisconfigurationException is a plain Exception: let the name decide.
        raise ConfigError("trainer", get_first_line(error)) from None
    except Exception as error:
        if type(error).__name__ != "MisconfigurationException":
            raise
        raise ConfigError("trainer", get_first_line(error)) from None
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # not one of the user's
        trainer.strategy.checkpoint_io = WholeCheckpointIO()
    return trainer


class KeepSignals(Callback):
    """Gives the signals back to the command line, which Lightning takes over before training.

    Lightning would wait for the end of a batch, then for all processes, and end with status 0.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        handle_signals_again()


def _build_profiler(name: str, run_dir: Path) -> Profiler | str:
    """Build a profiler that writes into the run directory; Lightning's own would only log."""
    kinds: dict[str, Callable[..., Profiler]] = {
        "simple": SimpleProfiler,
        "advanced": AdvancedProfiler,
        "pytorch": PyTorchProfiler,
    }
    kind = kinds.get(name.lower())
    return name if kind is None else kind(dirpath=run_dir, filename=PROFILE)


def say_profile(run_dir: Path) -> None:
    """Print where the profiler of a training has written."""
    for path in sorted(run_dir.glob(f"*-{PROFILE}*")):
        say(f"  profile: {path}")
