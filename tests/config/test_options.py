"""A range says what is in it, in the check and in the message."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_type_hints

import pytest
from omegaconf import MISSING

from surgery.config.comments import describe_keys
from surgery.config.options import (
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    Range,
    check_ranges,
    get_default,
    option,
)
from surgery.config.schema import RunConfig
from surgery.errors import ConfigError

INSIDE, OUTSIDE = True, False


@pytest.mark.parametrize(
    ("bounds", "text", "values"),
    [
        (POSITIVE, "above 0", {0: OUTSIDE, 1e-9: INSIDE, -1: OUTSIDE, math.inf: OUTSIDE}),
        (NOT_NEGATIVE, "at least 0", {0: INSIDE, -1e-9: OUTSIDE}),
        (COUNT, "at least 1", {0: OUTSIDE, 1: INSIDE}),
        (SHARE, "in [0, 1]", {0: INSIDE, 1: INSIDE, 1.1: OUTSIDE, -0.1: OUTSIDE}),
        (Range(0, 1, high_open=True), "in [0, 1)", {0: INSIDE, 1: OUTSIDE}),
        (Range(0, 1, low_open=True), "in (0, 1]", {0: OUTSIDE, 1: INSIDE}),
        (Range(0, 2**32 - 1), "in [0, 4294967295]", {2**32: OUTSIDE}),
        (Range(high=3, high_open=True), "below 3", {3: OUTSIDE, -99: INSIDE}),
        (Range(high=0.5), "at most 0.5", {0.5: INSIDE, 0.6: OUTSIDE}),
        (Range(), "finite", {-1e300: INSIDE, -math.inf: OUTSIDE, math.nan: OUTSIDE}),
    ],
)
def test_a_range(bounds: Range, text: str, values: dict[float, bool]) -> None:
    assert str(bounds) == text
    for value, inside in values.items():
        assert (value in bounds) is inside, value


@dataclass
class Inner:
    share: float = option(0.5, range=SHARE)
    numbers: list[float] = option(default_factory=lambda: [1.0], range=POSITIVE)


@dataclass
class Outer:
    count: int | None = option(1, range=COUNT, valid="a whole number above 0")
    flag: bool = option(False, range=COUNT)
    inner: Inner = option(default_factory=Inner)


@pytest.mark.parametrize(
    "good", [Outer(), Outer(count=None), Outer(inner=Inner(share=0, numbers=[]))]
)
def test_what_is_in_its_range_passes(good: Outer) -> None:
    check_ranges(good, "")


@pytest.mark.parametrize(
    ("bad", "key", "problem", "valid"),
    [
        (Outer(count=0), "outer.count", "must be at least 1", "a whole number above 0"),
        (Outer(inner=Inner(share=2)), "outer.inner.share", "must be in [0, 1]", "in [0, 1]"),
        (
            Outer(inner=Inner(numbers=[1, 0])),
            "outer.inner.numbers",
            "must be above 0",
            "above 0",
        ),
        (
            Outer(inner=Inner(numbers=[math.inf])),
            "outer.inner.numbers",
            "must be finite",
            "above 0",
        ),
    ],
)
def test_what_is_outside_is_named_at_whatever_depth(
    bad: Outer, key: str, problem: str, valid: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_ranges(bad, "outer.")
    assert (caught.value.key, caught.value.problem, caught.value.valid) == (key, problem, valid)
    assert caught.value.given is not None


def test_defaults() -> None:
    @dataclass
    class Options:
        required: int = option()
        as_hydra_says: int = option(MISSING)
        made: list[int] = option(default_factory=list)

    assert [get_default(field) for field in fields(Options)] == ["???", "???", []]


def _leaves(kind: Any, prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    keys = describe_keys(kind)
    for name, hint in get_type_hints(kind).items():
        found[f"{prefix}{name}"] = keys[name].comment
        if is_dataclass(hint):
            found |= _leaves(hint, f"{prefix}{name}.")
    return found


@pytest.mark.parametrize("key", _leaves(RunConfig))
def test_every_key_of_a_run_says_what_it_is_for(key: str) -> None:
    assert _leaves(RunConfig)[key]
