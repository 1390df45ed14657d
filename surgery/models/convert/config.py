"""Find the architectures that a model can be converted to, and convert its config, not weights."""

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
from surgery.models.convert.pair import ArchitecturePair

_PAIRS = {(pair.source, pair.target): pair for pair in (*rotary.PAIRS, *absolute.PAIRS)}
TARGETS = tuple(dict.fromkeys(target for _, target in _PAIRS))

Positions = Mapping[str, Any]
# All frequencies are 0, so nothing is rotated (transformers' p-RoPE with p = 0).
_NOPE = {"rope_type": "proportional", "rope_theta": 10000.0, "partial_rotary_factor": 0.0}
# Fields that the new config sets by itself.
_OWN = {"transformers_version", "architectures"}


def list_targets(config: PreTrainedConfig, positions: Positions | None = None) -> dict[str, str]:
    """List the architectures of all conversions, each with why this model cannot be converted.

    Args:
        positions: what replaces learned positions, see `convert_model`.

    Returns:
        Architecture → reason; "" if the model can be converted.
    """
    return {target: _find_obstacle(config, target, positions) for target in TARGETS}


def find_pair(
    config: PreTrainedConfig, into: str, positions: Positions | None = None
) -> ArchitecturePair:
    """Find how a model with this config is converted to `into`.

    Raises:
        ConversionError: no conversion leads to this architecture, or it would not be exact.
    """
    possible = [name for name, why in list_targets(config, positions).items() if not why]
    if into not in TARGETS:
        raise ConversionError(
            "no model can be converted to this architecture", given=into, valid=possible or TARGETS
        )
    why = _find_obstacle(config, into, positions)
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
    """Make the config of the converted model; `config` itself does not change.

    Args:
        into: model type of the new architecture, one of `TARGETS`.
        positions: ``{"theta": base}`` or ``{"nope": true}`` in place of learned positions.

    Raises:
        ConversionError: the conversion would not be exact.
    """
    pair = find_pair(config, into, positions)
    target = CONFIG_MAPPING[into]
    values: dict[str, Any] = {
        field.name: deepcopy(getattr(config, field.name))
        for field in fields(target)
        if field.name not in _OWN and hasattr(config, field.name)
    }
    for name, source in pair.fields.items():
        values[name] = source(config) if callable(source) else getattr(config, source)
    if positions is not None:
        values["rope_parameters"] = _make_rope_parameters(positions)
    new = target(**values)
    new.architectures = [get_model_class(new).__name__]
    new._name_or_path = config._name_or_path
    new._attn_implementation = config._attn_implementation
    return new


def get_model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class of the causal language model of a config."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    assert isinstance(model_class, type)
    return model_class


def map_tensors(
    config: PreTrainedConfig, into: str, positions: Positions | None = None
) -> list[Move]:
    """Map the tensors of the model to those of the converted one, by names in the state dict.

    A tied output matrix is not listed, since it is no tensor of its own. Learned positions are
    not listed either, since they are not kept.

    Raises:
        ConversionError: the conversion would not be exact.
    """
    pair = find_pair(config, into, positions)
    return [move for rule in pair.rules for move in rule.make_moves(config)]


def _find_obstacle(config: PreTrainedConfig, into: str, positions: Positions | None) -> str:
    pair = _PAIRS.get((config.model_type, into))
    if config.model_type == into:
        return f"model_type is {into!r} already"
    if pair is None:
        return (
            f"model_type is {config.model_type!r}: no exact conversion from it to {into} is known"
        )
    for why in (_find_unsupported(config), _check_positions(pair, positions)):
        if why:
            return why
    return next(
        (why for requirement in pair.requirements if (why := requirement.explain(config))), ""
    )


def _find_unsupported(config: PreTrainedConfig) -> str:
    """Find what no pair supports; empty if there is nothing."""
    if type(config) is not CONFIG_MAPPING[config.model_type] or hasattr(config, "auto_map"):
        return "auto_map: the model has its own code"
    if getattr(config, "quantization_config", None) is not None:
        return "quantization_config: only weights that are not quantized can be converted"
    if config.is_heterogeneous:
        return "per_layer_config: all layers must be alike"
    return ""


def _check_positions(pair: ArchitecturePair, positions: Positions | None) -> str:
    if pair.positions is None:
        if positions is None:
            return ""
        return f"{pair.source} has no learned positions that could be replaced"
    if positions is None:
        return f"{pair.target} has no learned positions, and nothing replaces them"
    _make_rope_parameters(positions)
    return ""


def _make_rope_parameters(positions: Positions) -> dict[str, Any]:
    theta = positions.get("theta")
    if dict(positions) == {"nope": True}:
        return dict(_NOPE)
    numeric = isinstance(theta, (int, float)) and not isinstance(theta, bool)
    if set(positions) != {"theta"} or not numeric or not theta or theta <= 1:
        raise ConversionError(
            "the base of rotary frequencies must be above 1",
            given=theta if "theta" in positions else dict(positions),
            valid="a number above 1",
        )
    return {"rope_type": "default", "rope_theta": float(theta)}
