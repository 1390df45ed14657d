"""What an option is, said once: its help and its range stand in the field that holds it.

Checks, error messages and the comments of `conf/` follow from them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from surgery.errors import ConfigError

_HELP, _RANGE, _VALID = "help", "range", "valid"


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
        """``[0, 1)``, ``above 0``, ``at least 1``."""
        if self.low is not None and self.high is not None:
            left, right = "(" if self.low_open else "[", ")" if self.high_open else "]"
            return f"in {left}{self.low:g}, {self.high:g}{right}"
        if self.low is not None:
            return f"{'above' if self.low_open else 'at least'} {self.low:g}"
        if self.high is not None:
            return f"{'below' if self.high_open else 'at most'} {self.high:g}"
        return "a finite number"


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
    """A dataclass field that says what it is for.

    Args:
        help: one line, the comment that stands beside the key in `conf/`.
        range: of a number, or of every number in a list; ``None`` as a value is always allowed.
        valid: what is valid, in words, where the type and the range do not say it.
    """
    metadata = {_HELP: help, _RANGE: range, _VALID: valid}
    if default_factory is not MISSING:
        return field(default_factory=default_factory, metadata=metadata)
    if default is MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


def help_of(option: Field[Any]) -> str:
    return str(option.metadata.get(_HELP, ""))


def valid_of(option: Field[Any]) -> str | None:
    """What is valid, in words; ``None`` where the field does not say."""
    said = option.metadata.get(_VALID)
    if said is None and option.metadata.get(_RANGE) is not None:
        return str(option.metadata[_RANGE])
    return said


def check_ranges(options: Any, prefix: str) -> None:
    """Hold every number of a dataclass against the range of its field.

    Args:
        prefix: dotted config key of the dataclass, with its dot.

    Raises:
        ConfigError: the first that is outside.
    """
    for one in fields(options):
        bounds, value = one.metadata.get(_RANGE), getattr(options, one.name)
        if bounds is None:
            continue
        for number in _numbers(value):
            if number not in bounds:
                raise ConfigError(
                    f"{prefix}{one.name}", f"must be {bounds}", given=value, valid=valid_of(one)
                )


def _numbers(value: Any) -> Iterator[float]:
    values = value if isinstance(value, (list, tuple)) else [value]
    for number in values:
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            yield number
