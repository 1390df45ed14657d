"""One run from the command line: Hydra composes, the pipeline runs, mistakes become a message."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

import surgery.hydra  # noqa: F401
from surgery.config.validate import check_config
from surgery.console import is_rank_zero
from surgery.errors import ConfigError, SurgeryError, refuse
from surgery.pipeline.files import remove_drafts
from surgery.refusals import explain_choice, explain_error, refuse_deep, refuse_doubles
from surgery.signals import Stopped


def run_command() -> None:
    """Compose a run from `sys.argv`, and execute it.

    Raises:
        SystemExit: with status 2 for what the user can mend.
        Stopped: by a signal; it says what the run leaves.
    """
    # Hydra then lets exceptions through instead of printing them and exiting with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    composed = False

    @hydra.main(version_base="1.3", config_path="pkg://surgery.conf", config_name="config")
    def train(cfg: DictConfig) -> None:
        nonlocal composed
        composed = True
        try:
            check_config(cfg)
            refuse_doubles(_list_chosen("attention"))
            # Takes seconds, so it comes after the checks: most mistakes are answered at once.
            from surgery.pipeline.run import execute

            execute(cfg)
        except (SurgeryError, OmegaConfBaseException) as error:
            _forget(Path(HydraConfig.get().runtime.output_dir))
            refuse(error)
        except Stopped as stop:
            stop.run_dir = Path(HydraConfig.get().runtime.output_dir)
            if is_rank_zero():
                remove_drafts(stop.run_dir)
                _forget(stop.run_dir)
            raise

    try:
        refuse_deep(sys.argv[1:])
        train()
    except (HydraException, OmegaConfBaseException, SurgeryError) as error:
        refuse(explain_error(error))
    except (ValueError, TypeError):  # Hydra's own, for a choice that is a number
        refusal = explain_choice(sys.argv[1:])
        if composed or refusal is None:
            raise
        refuse(refusal)
    except OSError as error:
        if composed:
            raise
        # All Hydra does with files before our first line is to make the run directory.
        where = error.filename or "the run directory"
        refuse(ConfigError("hydra.run.dir", f"cannot be made: {error.strerror}", given=where))


def _list_chosen(group: str) -> list[str]:
    """List what was chosen, in order, of a config group that allows several choices."""
    overrides, loader = HydraConfig.get().overrides, GlobalHydra.instance().config_loader()
    try:
        defaults = loader.compute_defaults_list(
            config_name=HydraConfig.get().job.config_name,
            overrides=[*overrides.hydra, *overrides.task],
            run_mode=RunMode.RUN,
        ).defaults
    except (HydraException, OmegaConfBaseException):
        return []  # something else is wrong, and is said with its key when the config is checked
    paths = [str(default.config_path) for default in defaults]
    return [p.removeprefix(f"{group}/") for p in paths if p.startswith(f"{group}/")]


def _forget(run_dir: Path) -> None:
    """Remove a run directory that holds nothing but what Hydra put there."""
    names = {entry.name for entry in run_dir.iterdir()} if run_dir.is_dir() else set()
    if ".hydra" in names and all(n == ".hydra" or n.endswith(".log") for n in names):
        shutil.rmtree(run_dir, ignore_errors=True)
