"""The registry of operations: from a name in a config to a typed spec."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from enum import Enum
from typing import Any, TypeVar, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from surgery.errors import ConfigError
from surgery.plan.operation import Operation

_REGISTRY: dict[str, type[Operation]] = {}
_Spec = TypeVar("_Spec", bound=type[Operation])


def operation(name: str) -> Callable[[_Spec], _Spec]:
    """Class decorator: makes a spec known under the name it has in configs."""

    def register(spec: _Spec) -> _Spec:
        spec.name = name
        _REGISTRY[name] = spec
        return spec

    return register


def operation_names() -> list[str]:
    return sorted(_REGISTRY)


def operation_fields(name: str) -> list[str]:
    """The options of an operation; none for one that does not exist."""
    return [field.name for field in fields(_REGISTRY[name])] if name in _REGISTRY else []


def parse_operations(attention: Mapping[str, Any]) -> list[Operation]:
    """Typed specs from `attention.*`, in the order in which they stand there.

    Raises:
        ConfigError: an unknown operation, an unknown option, or a value of the wrong type.
    """
    return [_parse(name, options) for name, options in attention.items()]


def _parse(name: str, options: Any) -> Operation:
    if name not in _REGISTRY:
        raise ConfigError(f"attention.{name}", "unknown operation", valid=operation_names())
    if not isinstance(options, Mapping):
        raise ConfigError(f"attention.{name}", "needs its options as keys", given=options)
    spec = _REGISTRY[name]
    known = [field.name for field in fields(spec)]
    for option in options:
        if option not in known:
            raise ConfigError(f"attention.{name}.{option}", "unknown key", valid=known)
    try:
        parsed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(spec), dict(options)))
    except OmegaConfBaseException as error:
        option = str(error.full_key or error.key).split("[")[0].split(".")[0]
        missing = isinstance(error, MissingMandatoryValue)
        problem = str(error.msg or error).splitlines()[0]
        if "ListConfig, list or tuple" in problem:
            problem = "is no list"
        raise ConfigError(
            f"attention.{name}.{option}",
            "a value is required here" if missing else problem,
            given=None if missing else repr(options.get(option)),
            valid=_values(spec, option),
        ) from None
    assert isinstance(parsed, Operation)
    _check_finite(parsed, options)
    return parsed


def _check_finite(spec: Operation, options: Mapping[str, Any]) -> None:
    """No plan or config file can hold infinity; nothing here has a use for it."""
    for field in fields(spec):
        value = getattr(spec, field.name)
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise ConfigError(
                spec.key(field.name),
                "must be finite",
                given=options[field.name],
                valid=_values(type(spec), field.name),
            )


def _values(spec: type[Operation], option: str) -> str | list[str]:
    """What an option accepts: as its field says, the members of an enum, or its declared type."""
    said = next((f.metadata.get("valid") for f in fields(spec) if f.name == option), None)
    if said is not None:
        return str(said)
    kind = get_type_hints(spec).get(option)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [member.name for member in kind]
    return kind.__name__ if type(kind) is type else str(kind)
