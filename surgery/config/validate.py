"""Check a composed config: every key is known, every value has its type and is in its range."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from surgery.config.options import check_ranges, find_dataclass, get_valid
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

# The pipeline sets these, from other config keys.
TRAINER_OWNED = {"logger", "callbacks", "default_root_dir", "use_distributed_sampler"}


def check_config(cfg: DictConfig) -> RunConfig:
    """Turn a composed config into a typed one, and check it.

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
    plain = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(plain, dict)
    _refuse_values_for_groups({str(key): value for key, value in plain.items()}, RunConfig)
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


def _refuse_values_for_groups(cfg: Mapping[str, Any], kind: type, path: str = "") -> None:
    """Refuse a value where a group of keys must stand; OmegaConf does not say where that is."""
    for name, hint in get_type_hints(kind).items():
        section = find_dataclass(hint)
        if section is None or name not in cfg:
            continue
        value = cfg[name]
        if isinstance(value, Mapping):
            _refuse_values_for_groups(value, section, f"{path}{name}.")
        elif value is None and section is not hint:
            continue
        elif not (isinstance(value, str) and value.startswith(("${", "???"))):
            raise ConfigError(
                f"{path}{name}",
                "must be a group of keys",
                given=str(value),
                valid=[field.name for field in fields(section)],
            )


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
    return ConfigError(key, first)


def change_data(data: DataConfig, changes: Mapping[str, Any]) -> DataConfig:
    """Return `data` with some of its keys changed.

    Raises:
        ConfigError: an unknown key of `data`, or a value of another type.
    """
    try:
        changed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(data), dict(changes)))
    except OmegaConfBaseException as error:
        found = _explain(error)
        raise ConfigError(
            f"data.{found.key}", found.problem, given=found.given, valid=found.valid
        ) from None
    assert isinstance(changed, DataConfig)
    return changed


def check_values(run: RunConfig) -> None:
    """Check values.

    Raises:
        ConfigError: the first value that is out of range or not possible.
    """
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
        raise ConfigError("trainer.max_steps", "must allow at least one training step", given=0)
    for key in options:
        if key in TRAINER_OWNED:
            raise ConfigError(f"trainer.{key}", "is set by the run, from other config keys")
        if key not in valid:
            raise ConfigError(
                f"trainer.{key}", "is not an option of Lightning's Trainer", valid=sorted(valid)
            )
