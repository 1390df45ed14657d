"""Check before any work that a checkpoint continues this very run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from surgery.config.schema import RunConfig
from surgery.errors import ConfigError, get_first_line
from surgery.plan.operation import Operation

# Where a config came from and how it is run, not what it describes.
_ASIDE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "_attn_implementation"}


def check_resume(run: RunConfig, config: PreTrainedConfig, operations: Sequence[Operation]) -> None:
    """Check that `resume` names a whole checkpoint of the same model, operations and optimizer.

    What is decided in the run itself is compared when the checkpoint is loaded.

    Args:
        config: of the original.
        operations: those that are performed before training.

    Raises:
        ConfigError: it does not; the error names the key that differs.
    """
    assert run.resume is not None
    stored = _read_hyperparameters(run.resume)
    _check_model(plain_config(config), stored.get("model_config") or {}, run)
    _check_operations([dict(one.to_json()) for one in operations], stored["plan"]["operations"])
    optim = stored.get("optim") or {}
    others = (
        ("optim", "name", "another optimizer"),
        ("optim.parameters", "parameters", "other parameters"),
    )
    for key, field, other in others:
        now = getattr(run.optim, field).value
        if optim.get(field, now) != now:
            raise ConfigError(
                key,
                f"the checkpoint to resume from was trained with {other}",
                given=now,
                valid=optim[field],
            )
    _find_rate(stored, run.resume)


def read_rate(path: str) -> float:
    """Read the peak learning rate of a checkpoint that `check_resume` has let through."""
    return _find_rate(_read_hyperparameters(path), path)


def _find_rate(stored: Mapping[str, Any], path: str) -> float:
    rate = (stored.get("optim") or {}).get("lr")
    if not isinstance(rate, (int, float)):
        raise ConfigError(
            "resume",
            "the checkpoint does not say its learning rate",
            given=path,
            valid="a checkpoint that a run of this pipeline has written",
        )
    return float(rate)


def plain_config(config: PreTrainedConfig) -> dict[str, Any]:
    """Turn a config into plain JSON types, as a `weights_only` checkpoint needs."""
    fields: dict[str, Any] = config.to_dict()
    return {
        k: str(v).removeprefix("torch.") if isinstance(v, torch.dtype) else v
        for k, v in fields.items()
    }


def _read_hyperparameters(path: str) -> Mapping[str, Any]:
    try:
        # Mapped: of a large file, only what is looked at is read.
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises whatever its reader stumbled over
        raise ConfigError(
            "resume",
            f"is no whole checkpoint: {get_first_line(error)}",
            given=path,
            valid="a .ckpt file that a run has finished writing",
        ) from None
    found = stored.get("hyper_parameters") if isinstance(stored, Mapping) else None
    plan = found.get("plan") if isinstance(found, Mapping) else None
    if not isinstance(plan, Mapping) or "operations" not in plan:
        raise ConfigError(
            "resume",
            "is a checkpoint of something else: it holds no plan",
            given=path,
            valid=f"one of this pipeline's, as in {Path('RUN_DIR', 'checkpoints', 'last.ckpt')}",
        )
    assert isinstance(found, Mapping)
    return found


def _check_model(now: Mapping[str, Any], was: Mapping[str, Any], run: RunConfig) -> None:
    was, now = (json.loads(json.dumps(one, default=str)) for one in (was, now))
    for name in sorted({**was, **now}.keys() - _ASIDE):
        if was.get(name) != now.get(name):
            raise ConfigError(
                "model.scratch" if run.model.scratch is not None else "model.path",
                f"the checkpoint to resume from was trained from another model: its {name} differs",
                given=str(now.get(name)),
                valid=str(was.get(name)),
            )


def _check_operations(now: Sequence[Mapping[str, Any]], was: Sequence[Mapping[str, Any]]) -> None:
    names = [[one["operation"] for one in operations] for operations in (now, was)]
    if names[0] != names[1]:
        raise ConfigError(
            "attention",
            "the checkpoint to resume from was trained with other operations",
            given=f"[{', '.join(names[0])}]",
            valid=f"[{', '.join(names[1])}]",
        )
    plain = (json.loads(json.dumps(operations)) for operations in (now, was))
    for ours, theirs in zip(*plain, strict=True):
        for option in {**theirs, **ours}:
            if ours.get(option) != theirs.get(option):
                raise ConfigError(
                    f"attention.{ours['operation']}.{option}",
                    "the checkpoint to resume from was trained with another value",
                    given=str(ours.get(option)),
                    valid=str(theirs.get(option)),
                )
