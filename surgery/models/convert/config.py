"""Which architectures a config can move to, and what it says there. No weights are looked at."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import fields
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)

from surgery.errors import ConversionError
from surgery.models.convert import absolute, rotary
from surgery.models.convert.moves import Move
from surgery.models.convert.pair import Pair

_PAIRS = {(pair.source, pair.target): pair for pair in (*rotary.PAIRS, *absolute.PAIRS)}
TARGETS = tuple(dict.fromkeys(target for _, target in _PAIRS))

Positions = Mapping[str, Any]
# Every frequency 0: nothing is rotated (transformers' p-RoPE with p = 0).
_NOPE = {"rope_type": "proportional", "rope_theta": 10000.0, "partial_rotary_factor": 0.0}
# What a new config says about itself.
_OWN = {"transformers_version", "architectures"}


def list_targets(config: PreTrainedConfig, positions: Positions | None = None) -> dict[str, str]:
    """Each architecture that models can move to, and why this one cannot; "" where it can.

    Args:
        positions: what is to stand in for learned positions, as for `convert_model`.
    """
    return {target: _obstacle(config, target, positions) for target in TARGETS}


def pair_for(config: PreTrainedConfig, into: str, positions: Positions | None = None) -> Pair:
    """How a model of this config moves to `into`.

    Raises:
        ConversionError: there is no such architecture here, or the move would not be exact.
    """
    possible = [name for name, why in list_targets(config, positions).items() if not why]
    if into not in TARGETS:
        raise ConversionError(
            "nothing here can move to this architecture", given=into, valid=possible or TARGETS
        )
    why = _obstacle(config, into, positions)
    if why:
        raise ConversionError(
            f"not the same model: {why}",
            given=into if positions is None else None,
            valid=possible or "none, for this model",
        )
    return _PAIRS[config.model_type, into]


def convert_config(
    config: PreTrainedConfig, into: str, positions: Positions | None = None
) -> PreTrainedConfig:
    """What the model's config becomes; `config` itself is left alone.

    Args:
        into: model type of the new architecture, one of `TARGETS`.
        positions: ``{"theta": base}`` or ``{"nope": true}`` in place of learned positions.

    Raises:
        ConversionError: the move would not be exact.
    """
    pair = pair_for(config, into, positions)
    target = CONFIG_MAPPING[into]
    values: dict[str, Any] = {
        field.name: deepcopy(getattr(config, field.name))
        for field in fields(target)
        if field.name not in _OWN and hasattr(config, field.name)
    }
    for name, source in pair.fields.items():
        values[name] = source(config) if callable(source) else getattr(config, source)
    if positions is not None:
        values["rope_parameters"] = _rope_parameters(positions)
    new = target(**values)
    new.architectures = [model_class(new).__name__]
    new._name_or_path = config._name_or_path
    new._attn_implementation = config._attn_implementation
    return new


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The causal language model of a config."""
    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    assert isinstance(found, type)
    return found


def tensor_map(
    config: PreTrainedConfig, into: str, positions: Positions | None = None
) -> list[Move]:
    """Where each tensor of the model goes, by its name in the state dict.

    A tied output matrix is no tensor of its own and is not named; nor are learned positions,
    which are left behind.

    Raises:
        ConversionError: the move would not be exact.
    """
    pair = pair_for(config, into, positions)
    return [move for rule in pair.rules for move in rule.moves(config)]


def _obstacle(config: PreTrainedConfig, into: str, positions: Positions | None) -> str:
    pair = _PAIRS.get((config.model_type, into))
    if config.model_type == into:
        return f"model_type is {into!r} already"
    if pair is None:
        return f"model_type is {config.model_type!r}: no exact way from there to {into} is known"
    for why in (_strange(config), _positions(pair, positions)):
        if why:
            return why
    return next((why for need in pair.needs if (why := need.reason(config))), "")


def _strange(config: PreTrainedConfig) -> str:
    """What no pair is about."""
    if type(config) is not CONFIG_MAPPING[config.model_type] or hasattr(config, "auto_map"):
        return "auto_map: the model brings code of its own"
    if getattr(config, "quantization_config", None) is not None:
        return "quantization_config: only plain weights can be moved"
    if config.is_heterogeneous:
        return "per_layer_config: only layers that are all alike can be moved"
    return ""


def _positions(pair: Pair, positions: Positions | None) -> str:
    if pair.positions is None:
        if positions is None:
            return ""
        return f"{pair.source} has no learned positions that anything could stand in for"
    if positions is None:
        return f"{pair.target} has no learned positions, and nothing is to stand in for them"
    _rope_parameters(positions)
    return ""


def _rope_parameters(positions: Positions) -> dict[str, Any]:
    theta = positions.get("theta")
    if dict(positions) == {"nope": True}:
        return dict(_NOPE)
    numeric = isinstance(theta, (int, float)) and not isinstance(theta, bool)
    if set(positions) != {"theta"} or not numeric or not theta or theta <= 1:
        raise ConversionError(
            "a base of rotary frequencies must be above 1",
            given=theta if "theta" in positions else dict(positions),
            valid="a number above 1",
        )
    return {"rope_type": "default", "rope_theta": float(theta)}
