"""What W&B is told: a key of `logger` that is set, else W&B's own environment, else a default."""

from __future__ import annotations

import configparser
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.config.schema import LoggerConfig, LoggerMode
from surgery.errors import ConfigError

DEFAULT_PROJECT = "attention-surgery"

# Key of `logger` → the variable of W&B that stands for it where the key is null.
VARIABLES = {
    "mode": "WANDB_MODE",
    "project": "WANDB_PROJECT",
    "name": "WANDB_NAME",
    "entity": "WANDB_ENTITY",
    "group": "WANDB_RUN_GROUP",
    "tags": "WANDB_TAGS",
    "notes": "WANDB_NOTES",
}
# W&B's names of modes → ours. `shared` is online, with several writers.
_MODES = {
    "online": LoggerMode.online,
    "run": LoggerMode.online,
    "shared": LoggerMode.online,
    "offline": LoggerMode.offline,
    "dryrun": LoggerMode.offline,
    "disabled": LoggerMode.disabled,
}
# Not W&B's own any more, but transformers and many scripts still read it.
DISABLED = "WANDB_DISABLED"
_TRUE = ("1", "true", "yes", "on")


@dataclass(frozen=True)
class WandbOptions:
    """The options of a W&B run.

    Attributes:
        mode: what is done.
        mode_key: the config key or the variable that says so.
        init: arguments of `wandb.init`; only those that somebody has set, and the project.
        folder: where W&B makes its folder `wandb`; ``None``: in the run directory.
        lines: what is to be said: variables that a key overrules, or that W&B is off.
    """

    mode: LoggerMode
    mode_key: str
    init: Mapping[str, Any]
    folder: Path | None
    lines: list[str] = field(default_factory=list)


def resolve_wandb_options(
    cfg: LoggerConfig, environ: Mapping[str, str] = os.environ
) -> WandbOptions:
    """Decide between the config and the environment.

    Raises:
        ConfigError: the variable for the mode holds no mode.
    """
    lines = []
    found: dict[str, Any] = {}
    for key, variable in VARIABLES.items():
        own, theirs = getattr(cfg, key), environ.get(variable) or None
        if own is not None and theirs is not None and theirs != _format_value(own):
            lines.append(f"  W&B: logger.{key}={_format_value(own)} overrules {variable}={theirs}")
        found[key] = theirs if own is None else own
    mode, mode_key = _find_mode(cfg, found.pop("mode"), environ, lines)
    if isinstance(found["tags"], str):
        found["tags"] = [tag.strip() for tag in found["tags"].split(",") if tag.strip()]
    found["project"] = found["project"] or DEFAULT_PROJECT
    if mode is LoggerMode.disabled:
        lines.append(f"  W&B is off, and writes nothing: {mode_key}")
    folder = environ.get("WANDB_DIR")
    return WandbOptions(
        mode,
        mode_key,
        {key: value for key, value in found.items() if value is not None},
        Path(folder).expanduser().absolute() if folder else None,
        lines,
    )


def _find_mode(
    cfg: LoggerConfig, found: Any, environ: Mapping[str, str], lines: list[str]
) -> tuple[LoggerMode, str]:
    """Find the mode, and the key or variable that sets it, as it is written."""
    disabled = environ.get(DISABLED, "")
    off = disabled.strip().lower() in _TRUE
    if cfg.mode is not None:
        if off and cfg.mode is not LoggerMode.disabled:
            lines.append(f"  W&B: logger.mode={cfg.mode.value} overrules {DISABLED}={disabled}")
        return cfg.mode, f"logger.mode={cfg.mode.value}"
    if off:
        return LoggerMode.disabled, f"{DISABLED}={disabled}"
    if found is None:
        stored = _read_stored_mode(environ)
        if stored in _MODES:
            return _MODES[stored], f"mode={stored} in W&B's settings file"
        return LoggerMode.offline, "logger.mode=null"
    if found not in _MODES:
        raise ConfigError(VARIABLES["mode"], "is no mode of W&B", given=found, valid=list(_MODES))
    return _MODES[found], f"{VARIABLES['mode']}={found}"


def _read_stored_mode(environ: Mapping[str, str]) -> str | None:
    """Read the mode that the commands `wandb offline` and `wandb disabled` keep in a file."""
    home = environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb"
    files = [Path(home).expanduser() / "settings", Path("wandb", "settings")]  # the later one wins
    stored = configparser.ConfigParser(interpolation=None)
    try:
        stored.read(files, encoding="utf-8")
    except (OSError, ValueError, configparser.Error):
        return None  # W&B says what is wrong with it
    return stored.get("default", "mode", fallback=None)


def _format_value(value: Any) -> str:
    if isinstance(value, LoggerMode):
        return value.value
    return ",".join(value) if isinstance(value, list) else str(value)
