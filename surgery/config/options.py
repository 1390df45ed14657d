"""Options: the field of a dataclass holds the help and the range of a config key.

Checks, error messages and the comments of `conf/` are made from them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from types import NoneType
from typing import Any, get_args

from surgery.errors import ConfigError

_HELP, _RANGE, _VALID = "help", "range", "valid"
REQUIRED = "???"  # as OmegaConf and Hydra write it


@dataclass(frozen=True)
class Range:
    """Numbers between two bounds; ``None`` leaves a side open. Infinity is in no range.

    Attributes:
        low, high: the bounds.
        low_open, high_open: whether the bound itself is left out.
    """

    low: float | None = None
    high: float | None = None
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = self.low is None or (value > self.low if self.low_open else value >= self.low)
        below = self.high is None or (value < self.high if self.high_open else value <= self.high)
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        """``in [0, 1)``, ``above 0``, ``at least 1``."""
        if self.low is not None and self.high is not None:
            left, right = "(" if self.low_open else "[", ")" if self.high_open else "]"
            return f"in {left}{self.low}, {self.high}{right}"
        if self.low is not None:
            return f"{'above' if self.low_open else 'at least'} {self.low}"
        if self.high is not None:
            return f"{'below' if self.high_open else 'at most'} {self.high}"
        return "finite"


POSITIVE = Range(low=0, low_open=True)
NOT_NEGATIVE = Range(low=0)
SHARE = Range(low=0, high=1)
COUNT = Range(low=1)


def option(
    default: Any = MISSING,
    help: str = "",
    *,
    range: Range | None = None,
    valid: str | None = None,
    default_factory: Any = MISSING,
) -> Any:
    """Make a dataclass field with a help text and a range.

    Args:
        help: what it is for, in a few words: the comment beside the key in `conf/`. The choices
            of an enum and unusual ranges are added there automatically.
        range: of a number, or of every number in a list; ``None`` as a value is always allowed.
        valid: what is valid, in words, if the type and the range are not enough.
    """
    metadata = {_HELP: help, _RANGE: range, _VALID: valid}
    if default_factory is not MISSING:
        return field(default_factory=default_factory, metadata=metadata)
    if default is MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


def find_dataclass(hint: Any) -> type | None:
    """Find the dataclass of a type hint, which may allow ``None``; ``None`` if it has none."""
    choices = [one for one in get_args(hint) or (hint,) if one is not NoneType]
    only = choices[0] if len(choices) == 1 else None
    return only if isinstance(only, type) and is_dataclass(only) else None


def get_help(option: Field[Any]) -> str:
    return str(option.metadata.get(_HELP, ""))


def get_range(option: Field[Any]) -> Range | None:
    return option.metadata.get(_RANGE)


def get_default(option: Field[Any]) -> Any:
    """Get the default of a field; ``???`` if a value is required."""
    if option.default is not MISSING:
        return option.default
    if option.default_factory is not MISSING:
        return option.default_factory()
    return REQUIRED


def get_valid(option: Field[Any]) -> str | None:
    """Get what is valid, in words; ``None`` if the field has neither words nor a range."""
    valid = option.metadata.get(_VALID)
    if valid is None and option.metadata.get(_RANGE) is not None:
        return str(option.metadata[_RANGE])
    return valid


def check_ranges(options: Any, prefix: str) -> None:
    """Check every number of a dataclass, and of nested ones, against the range of its field.

    Args:
        prefix: dotted config key of the dataclass, with its dot; empty for a whole run.

    Raises:
        ConfigError: the first number that is out of range.
    """
    for entry in fields(options):
        bounds, value = get_range(entry), getattr(options, entry.name)
        key = f"{prefix}{entry.name}"
        if is_dataclass(value):
            check_ranges(value, f"{key}.")
        if bounds is None:
            continue
        for number in _list_numbers(value):
            if number not in bounds:
                problem = f"must be {bounds}" if math.isfinite(number) else "must be finite"
                raise ConfigError(key, problem, given=value, valid=get_valid(entry))


def _list_numbers(value: Any) -> Iterator[float]:
    values = value if isinstance(value, (list, tuple)) else [value]
    for number in values:
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            yield number
