"""The kinds of rotary positions: the options of each, and the `rope_parameters` they mean.

Names and formulas are those of transformers' `rope_parameters`.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

from surgery.errors import ConfigError


class RopeType(Enum):
    """How positions become angles. θ_i = theta^(-2i/d) is the frequency of the i-th pair.

    Attributes:
        default: unscaled (Su et al. 2021, arXiv:2104.09864).
        linear: every θ_i divided by factor (Chen et al. 2023, arXiv:2306.15595).
        dynamic: theta grows with the length once it exceeds the trained one (NTK-aware).
        yarn: slow pairs divided, fast ones kept, logits sharpened (Peng et al. 2023,
            arXiv:2309.00071).
        longrope: a divisor per pair, one list for short inputs and one for long (Ding et al. 2024,
            arXiv:2402.13753).
        llama3: slow pairs divided, fast ones kept (Llama 3, arXiv:2407.21783).
        proportional: only the fastest pairs rotate (p-RoPE, arXiv:2410.06205).
        none: nothing rotates (NoPE, arXiv:2305.19466; dropped after training: arXiv:2512.12167).
    """

    default = "default"
    linear = "linear"
    dynamic = "dynamic"
    yarn = "yarn"
    longrope = "longrope"
    llama3 = "llama3"
    proportional = "proportional"
    none = "none"


_COMMON = {"theta", "partial_rotary_factor"}
_YARN = {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
# Type → options it needs, options it may have. `max_position_embeddings` goes with all.
_OPTIONS: dict[RopeType, tuple[set[str], set[str]]] = {
    RopeType.default: (set(), _COMMON),
    RopeType.linear: ({"factor"}, _COMMON),
    RopeType.dynamic: ({"factor"}, _COMMON),
    RopeType.yarn: ({"factor"}, _COMMON | _YARN),
    RopeType.longrope: ({"short_factor", "long_factor"}, _COMMON | {"factor", "attention_factor"}),
    RopeType.llama3: ({"factor"}, _COMMON | {"low_freq_factor", "high_freq_factor"}),
    RopeType.proportional: ({"partial_rotary_factor"}, _COMMON | {"factor"}),
    RopeType.none: (set(), set()),
}
# What is valid for the options that a type needs.
_VALID = {
    "factor": "a number above 1",
    "partial_rotary_factor": "above 0, at most 1 (for no rotation at all: type none)",
    "short_factor": "a positive number for each rotated pair of dimensions",
    "long_factor": "a positive number for each rotated pair of dimensions",
}
OPTIONS = sorted(set.union(*(needed | possible for needed, possible in _OPTIONS.values())))
# Types whose `rope_parameters` hold the length before scaling.
HOLDS_ORIGINAL = (RopeType.yarn, RopeType.longrope, RopeType.llama3)
SCALED = (RopeType.linear, RopeType.proportional, *HOLDS_ORIGINAL)
NAMES = {"theta": "rope_theta"}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
NOPE = {"rope_type": "proportional", "partial_rotary_factor": 0.0}


def check_type_options(kind: RopeType, given: Mapping[str, Any], key: str) -> None:
    """Refuse an option that a type lacks or does not use, or a value that this type cannot have.

    Ranges that hold for every type are checked before.

    Args:
        given: options that are not ``None``, by name.
        key: dotted config key of the operation.

    Raises:
        ConfigError: naming the option and what is valid.
    """
    needed, possible = _OPTIONS[kind]
    for name in sorted(needed - set(given)):
        raise ConfigError(f"{key}.{name}", f"type {kind.value} needs it", valid=_VALID[name])
    for name in sorted(set(given) & set(OPTIONS) - needed - possible):
        raise ConfigError(
            f"{key}.{name}",
            f"type {kind.value} does not use it",
            given=given[name],
            valid=f"null; {kind.value} has {', '.join(sorted(needed | possible)) or 'no options'}",
        )
    refused = [n for n in ("short_factor", "long_factor") if n in given and not given[n]]
    if kind is not RopeType.proportional and given.get("factor") == 1:
        refused.append("factor")
    for name in refused:
        raise ConfigError(
            f"{key}.{name}", "is not a valid value", given=given[name], valid=_VALID[name]
        )
    _check_order(kind, given, key)


def _check_order(kind: RopeType, given: Mapping[str, Any], key: str) -> None:
    slow, fast = given.get("beta_slow", 1), given.get("beta_fast", 32)
    if kind is RopeType.yarn and slow >= fast:
        raise ConfigError(
            f"{key}.beta_fast",
            f"must be above beta_slow ({slow:g})",
            given=fast,
            valid="32 with beta_slow 1 in the paper",
        )
    low, high = (given.get(name, value) for name, value in LLAMA3.items())
    if kind is RopeType.llama3 and low >= high:
        raise ConfigError(
            f"{key}.high_freq_factor",
            f"must be above low_freq_factor ({low:g})",
            given=high,
            valid="4 with low_freq_factor 1 in Llama 3.1",
        )
    if ("mscale" in given) != ("mscale_all_dim" in given):
        raise ConfigError(
            f"{key}.mscale",
            "mscale and mscale_all_dim only count together",
            given="mscale" if "mscale" in given else "mscale_all_dim",
            valid="both or neither",
        )
    if "mscale" in given and "attention_factor" in given:
        raise ConfigError(
            f"{key}.attention_factor",
            "cannot be given together with mscale, which computes it",
            given=given["attention_factor"],
            valid="one of the two",
        )
    short, long = given.get("short_factor"), given.get("long_factor")
    if short and long and len(short) != len(long):
        raise ConfigError(
            f"{key}.long_factor",
            f"is not as long as short_factor ({len(short)} numbers)",
            given=f"{len(long)} numbers",
            valid=f"{len(short)} numbers",
        )


def make_rope_parameters(
    kind: RopeType, given: Mapping[str, Any], current: Mapping[str, Any], original: int | None
) -> dict[str, Any]:
    """Make the new `rope_parameters` of a config.

    Args:
        given: options that are not ``None``.
        current: the flat `rope_parameters` so far; theta, a rotary width and keys of the
            architecture's own are kept.
        original: positions before scaling, for types that hold it.
    """
    if kind is RopeType.none:
        new = dict(NOPE)
    else:
        new = {"rope_type": kind.value}
        new |= {NAMES.get(name, name): given[name] for name in OPTIONS if name in given}
        if kind is RopeType.llama3:
            new = {**LLAMA3, **new}
        if kind in HOLDS_ORIGINAL:
            new["original_max_position_embeddings"] = original
    theirs = set(OPTIONS) | {"rope_type", "type", "original_max_position_embeddings"}
    if current.get("rope_type") != "proportional":
        theirs -= {"partial_rotary_factor"}
    return {name: value for name, value in current.items() if name not in theirs} | new
