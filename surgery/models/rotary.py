"""Finding and building the modules that turn positions into rotations (RoPE, Su et al. 2021).

Every architecture has a class of its own for it, with its own layout of cos and sin. All that is
computed here is computed by that class, built from a config that says what is wanted.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

LAYER_TYPE = "layer_type"
# An `nn.Module` with a `config`.
Rotary = Any


def rotaries(model: PreTrainedModel, config: PreTrainedConfig | None = None) -> dict[str, Rotary]:
    """Path → module, for all that compute rotations from `rope_parameters`.

    Args:
        config: only those that read this very config object; ``None`` for all.
    """
    return {
        path: module
        for path, module in model.named_modules()
        if _is_rotary(module) and (config is None or module.config is config)
    }


def _is_rotary(module: nn.Module) -> bool:
    own = getattr(module, "config", None)
    if not isinstance(own, PreTrainedConfig) or not getattr(own, "rope_parameters", None):
        return False
    if not any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False)):
        return False
    parameters = inspect.signature(type(module)).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    return needed == ["config"]


def build(module: Rotary, config: PreTrainedConfig) -> Rotary:
    """A fresh module of the same class for `config`, in fp32 on the CPU.

    Raises what the class raises for a config it cannot use.
    """
    with torch.device("cpu"):
        return type(module)(config=config).float()


def rotary_of(model: PreTrainedModel, path: str) -> Rotary | None:
    """What computes the rotations of an attention block; ``None`` where that cannot be told.

    That is the only one held by the nearest module around the block that holds any.
    """
    found = rotaries(model)
    while path:
        path = path.rpartition(".")[0]
        held = [module for name, module in found.items() if name.rpartition(".")[0] == path]
        if held:
            return held[0] if len(held) == 1 else None
    return None


def nested_types(config: PreTrainedConfig) -> list[str]:
    """The layer types that have `rope_parameters` of their own; none where all share one."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return list(config.nested_rope_parameter_keys(parameters))


def layer_type_of(config: PreTrainedConfig, block: nn.Module) -> str | None:
    """Under which key of nested `rope_parameters` an attention block stands.

    ``None`` where the parameters are not nested.

    Raises:
        ValueError: they are, and the block's layer type is not among them.
    """
    nested = nested_types(config)
    if not nested:
        return None
    kinds, layer = getattr(config, "layer_types", None), getattr(block, "layer_idx", None)
    kind = kinds[layer] if kinds and isinstance(layer, int) and layer < len(kinds) else None
    if kind not in nested:
        raise ValueError(f"its layer type {kind} is none of {', '.join(nested)}")
    return kind


def with_parameters(
    config: PreTrainedConfig, layer_type: str | None, parameters: Mapping[str, Any]
) -> PreTrainedConfig:
    """A copy of `config` with other `rope_parameters`, for one layer type or for all."""
    changed = copy.deepcopy(config)
    if getattr(changed, "head_dim", 0) is None:  # not every formula derives it
        changed.head_dim = changed.hidden_size // changed.num_attention_heads
    new = dict(parameters)
    changed.rope_parameters = (
        new if layer_type is None else dict(config.rope_parameters) | {layer_type: new}
    )
    return changed


def frequencies(module: Rotary, layer_type: str | None) -> tuple[torch.Tensor, float]:
    """Radians per position [rotary width / 2], and the factor on cos and sin."""
    prefix = "" if layer_type is None else f"{layer_type}_"
    return (
        getattr(module, f"{prefix}inv_freq"),
        float(getattr(module, f"{prefix}attention_scaling", 1.0)),
    )


def rotation(
    module: Rotary, like: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None
) -> Any:
    """What the model hands to its attention as `position_embeddings`: mostly (cos, sin).

    Args:
        like: a tensor of the wanted device and dtype.
        position_ids: [batch or 1, length].
    """
    if LAYER_TYPE in inspect.signature(module.forward).parameters:
        return module(like, position_ids, layer_type)
    return module(like, position_ids)
