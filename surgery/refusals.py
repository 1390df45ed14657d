"""Hydra's own errors as ours: the key, what was given, what is valid."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from importlib.resources import files
from itertools import accumulate
from typing import Any, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from surgery.config.schema import RunConfig
from surgery.errors import ConfigError

_LEVELS = {"[": 1, "{": 1, "(": 1, "]": -1, "}": -1, ")": -1}
_MOST_LEVELS = 20
_UNKNOWN_KEY = re.compile(r"Could not override '([^']+)'\.")
_NO_OPTION = re.compile(r"Could not (?:find|load) '([^'/]+)/([^']*)'")
_NO_GROUP = re.compile(r"Error merging override ([^=]+)=(.*)")
_OPTIONS = re.compile(r"Available options in '[^']+':\n((?:\t.*\n?)+)")


def explain_error(error: Exception) -> Exception:
    """A `ConfigError` where Hydra's error is understood, else the error itself.

    Hydra answers a misspelt key with advice to append it, which here would only be refused later.
    """
    text = str(error)
    no_option = _NO_OPTION.search(text)
    if no_option is not None:
        group, name = no_option.groups()
        options = _OPTIONS.search(text)
        valid = options.group(1).split() if options else _list_choices(group)
        return ConfigError(group, "there is no such choice", given=name or "nothing", valid=valid)
    unknown = _UNKNOWN_KEY.search(text)
    if unknown is not None and "defaults list" not in text:
        key = unknown.group(1)
        undeclared = _find_undeclared(key)
        if undeclared is not None:
            return undeclared
        return ConfigError(key, "unknown key", valid=_list_keys_beside(key))
    merged = _NO_GROUP.match(text)
    if merged is not None:
        key, value = merged.groups()
        if value.startswith("{"):
            return ConfigError(key, "must be no group of keys", given=value, valid="a list")
        valid = _list_keys_beside(f"{key}.")
        return ConfigError(key, "must be a group of keys", given=value, valid=valid)
    return error


def explain_choice(arguments: Iterable[str]) -> ConfigError | None:
    """Make the error for a choice that is no name; Hydra does not say of which group."""
    for argument in arguments:
        key, _, value = argument.partition("=")
        valid = _list_choices(key.lstrip("+~").partition("@")[0])
        if valid and any(n.strip() not in valid for n in value.strip("[]").split(",")):
            return ConfigError(
                key.lstrip("+~"), "there is no such choice", given=value, valid=valid
            )
    return None


def refuse_deep(arguments: Iterable[str]) -> None:
    """Refuse an override nested so deeply that Hydra's parser, which recurses, could not end.

    Raises:
        ConfigError: naming its key.
    """
    for argument in arguments:
        levels = accumulate(_LEVELS.get(letter, 0) for letter in argument)
        if max(levels, default=0) > _MOST_LEVELS:
            key, _, value = argument.partition("=")
            raise ConfigError(
                key.lstrip("+~"),
                "is nested too deeply",
                given=f"{value[:40]}…",
                valid=f"at most {_MOST_LEVELS} levels of brackets",
            )


def refuse_doubles(chosen: Iterable[str]) -> None:
    """Refuse two files of `attention` that hold the same operation; Hydra would merge them.

    Args:
        chosen: names of files in `conf/attention/`, in order.

    Raises:
        ConfigError: two of them are for one operation.
    """
    held: dict[str, str] = {}
    for name in chosen:
        entry = files("surgery.conf").joinpath("attention", f"{name}.yaml")
        if not entry.is_file():  # an app's own
            continue
        for operation in OmegaConf.create(entry.read_text(encoding="utf-8")):
            if operation in held:
                raise ConfigError(
                    "attention",
                    f"{held[str(operation)]} and {name} both set attention.{operation}: the "
                    "options of the later one would hold, and the operation be performed once",
                    given=f"[{', '.join(chosen)}]",
                    valid="one of them, or two runs",
                )
            held[str(operation)] = name


def _find_undeclared(key: str) -> ConfigError | None:
    """Make the error for an option of an operation that is not in the list."""
    parts = key.split(".")
    if len(parts) != 3 or parts[0] != "attention":
        return None
    # torch and transformers take seconds.
    from surgery.plan.registry import list_options

    if parts[2] not in list_options(parts[1]):
        return None
    return ConfigError(
        key,
        "this operation is not among those declared",
        given=parts[1],
        valid=f"attention=[{parts[1]}], or +recipe= one that has it",
    )


def _list_choices(group: str) -> list[str]:
    """The files of a config group, and what is stored there."""
    folder = files("surgery.conf").joinpath(group)
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    names += ConfigStore.instance().repo.get(group, {})
    return sorted({name.removesuffix(".yaml") for name in names if name.endswith(".yaml")})


def _list_keys_beside(key: str) -> list[str] | str | None:
    """The keys the schema knows at the depth at which `key` goes wrong."""
    schema: Any = RunConfig
    for part in key.split("."):
        hints = get_type_hints(schema)
        if part not in hints:
            break
        if not is_dataclass(hints[part]):
            if part == "attention":
                return _list_operation_keys(key)
            # Free-form: the keys belong to Lightning, or to a callback's class.
            return f"a key that is there already, or +{key}=<value> to add one"
        schema = hints[part]
    return [field.name for field in fields(schema)]


def _list_operation_keys(key: str) -> list[str] | None:
    # torch and transformers take seconds.
    from surgery.plan.registry import list_operations, list_options

    parts = key.split(".")
    return list_options(parts[1]) or None if len(parts) > 2 else list_operations()
