"""From a composed config to a checked one: every key known, every value of its type."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from surgery.config.options import check_ranges, get_valid
from surgery.config.schema import (
    DataConfig,
    ExportConfig,
    ObjectiveConfig,
    ObjectiveName,
    OptimConfig,
    RunConfig,
    Stage,
)
from surgery.errors import ConfigError

_SHARD_SIZE = re.compile(r"\d+(\.\d+)?[KMGT]B")

# Set by the pipeline itself, from parts of the config that have their own keys.
TRAINER_OWNED = {"logger", "callbacks", "default_root_dir", "use_distributed_sampler"}


def check_config(cfg: DictConfig) -> RunConfig:
    """The typed config, or one `ConfigError` naming the first key that cannot be.

    Raises:
        ConfigError: unknown key at any depth, wrong type, missing value, or a value out of range.
    """
    known = set(RunConfig.__dataclass_fields__)
    for key in cfg:
        if key == "recipe":
            raise ConfigError(
                "recipe",
                "the recipe group was not composed, so this recipe would change nothing",
                given=OmegaConf.to_container(cfg, resolve=False)["recipe"],  # type: ignore[index, call-overload]
                valid="`import surgery.hydra` before Hydra starts, then +recipe=<name>",
            )
        if key not in known:
            raise ConfigError(str(key), "unknown key", valid=sorted(known))
    try:
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), cfg)
        _refuse_missing(merged)
        run = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise _explain(error) from None
    assert isinstance(run, RunConfig)
    check_values(run)
    if Stage.train in run.stages:  # Lightning takes seconds to import, and a plan needs none of it
        _check_trainer(run.trainer)
    return run


def _refuse_missing(cfg: Any) -> None:
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(missing[0], "a value is required here", valid=f"{missing[0]}=<value>")


def _explain(error: OmegaConfBaseException) -> ConfigError:
    key = error.full_key or str(error.key)
    first = str(error.msg or error).splitlines()[0]
    if isinstance(error, ConfigKeyError):
        fields = getattr(error.object_type, "__dataclass_fields__", {})
        return ConfigError(key, "unknown key", valid=list(fields) or None)
    if isinstance(error, MissingMandatoryValue):
        return ConfigError(key, "a value is required here")
    if isinstance(error, InterpolationResolutionError):
        return ConfigError(key, f"the reference cannot be resolved: {first}")
    if isinstance(error, ValidationError):
        return ConfigError(key, first)
    return ConfigError(key, first)


def change_data(data: DataConfig, changes: Mapping[str, Any]) -> DataConfig:
    """`data` with some of its keys changed.

    Raises:
        ConfigError: an unknown key of `data`, or a value of another type.
    """
    try:
        found = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(data), dict(changes)))
    except OmegaConfBaseException as error:
        said = _explain(error)
        raise ConfigError(
            f"data.{said.key}", said.problem, given=said.given, valid=said.valid
        ) from None
    assert isinstance(found, DataConfig)
    return found


def check_values(run: RunConfig) -> None:
    """Raises: ConfigError, for the first value that is out of its range or cannot be."""
    check_ranges(run, "")
    _check_objective(run.objective)
    if len(run.optim.betas) != 2:
        raise ConfigError(
            "optim.betas",
            "needs two numbers",
            given=run.optim.betas,
            valid=get_valid(OptimConfig.__dataclass_fields__["betas"]),
        )
    if not _SHARD_SIZE.fullmatch(run.export.max_shard_size):
        raise ConfigError(
            "export.max_shard_size",
            "must be a size",
            given=run.export.max_shard_size,
            valid=get_valid(ExportConfig.__dataclass_fields__["max_shard_size"]),
        )
    if not run.stages:
        raise ConfigError("stages", "nothing to do", given=[], valid="at least one stage")


def _check_objective(objective: ObjectiveConfig) -> None:
    if objective.name is not ObjectiveName.lm:
        return
    if objective.attention_weight > 0:
        raise ConfigError(
            "objective.attention_weight",
            "lm has no teacher whose attention could be matched",
            given=objective.attention_weight,
            valid="0, or objective=distill",
        )
    if objective.teacher is not None:
        raise ConfigError(
            "objective.teacher",
            "lm learns from the text alone",
            given=objective.teacher,
            valid="null, or objective=distill",
        )


def _check_trainer(options: Mapping[str, Any]) -> None:
    from pytorch_lightning import Trainer  # takes seconds

    valid = set(inspect.signature(Trainer.__init__).parameters) - {"self"} - TRAINER_OWNED
    if options.get("max_steps") == 0:
        raise ConfigError("trainer.max_steps", "lets no training step happen", given=0)
    for key in options:
        if key in TRAINER_OWNED:
            raise ConfigError(f"trainer.{key}", "set by the run itself, through its own keys")
        if key not in valid:
            raise ConfigError(
                f"trainer.{key}", "not an option of Lightning's Trainer", valid=sorted(valid)
            )
