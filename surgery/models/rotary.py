"""Find and build the modules that turn positions into rotations (RoPE, Su et al. 2021).

Every architecture has its own class for this, with its own layout of cos and sin. All computation
here is done by that class, built from a config with the wanted values.
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
RotaryModule = Any


def find_rotaries(
    model: PreTrainedModel, config: PreTrainedConfig | None = None
) -> dict[str, RotaryModule]:
    """Find the modules that compute rotations from `rope_parameters`: path → module.

    Args:
        config: only modules that read this config object; ``None`` for all.
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


def build_rotary(module: RotaryModule, config: PreTrainedConfig) -> RotaryModule:
    """Build a new module of the same class for `config`, in fp32 on the CPU.

    It raises whatever the class raises for a config that it cannot use.
    """
    with torch.device("cpu"):
        return type(module)(config=config).float()


def find_rotary(model: PreTrainedModel, path: str) -> RotaryModule | None:
    """Find the module that computes the rotations of an attention block; ``None`` if unclear.

    It is the only such module in the nearest module around the block that has any.
    """
    rotaries = find_rotaries(model)
    while path:
        path = path.rpartition(".")[0]
        inner = [module for name, module in rotaries.items() if name.rpartition(".")[0] == path]
        if inner:
            return inner[0] if len(inner) == 1 else None
    return None


def list_nested_types(config: PreTrainedConfig) -> list[str]:
    """List the layer types that have their own `rope_parameters`; empty if all share them."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return list(config.nested_rope_parameter_keys(parameters))


def find_layer_type(config: PreTrainedConfig, block: nn.Module) -> str | None:
    """Find the key of an attention block in nested `rope_parameters`.

    ``None`` if the parameters are not nested.

    Raises:
        ValueError: they are nested, but have no entry for the block's layer type.
    """
    nested = list_nested_types(config)
    if not nested:
        return None
    kinds, layer = getattr(config, "layer_types", None), getattr(block, "layer_idx", None)
    kind = kinds[layer] if kinds and isinstance(layer, int) and layer < len(kinds) else None
    if kind not in nested:
        raise ValueError(f"its layer type {kind} is not one of {', '.join(nested)}")
    return kind


def replace_parameters(
    config: PreTrainedConfig, layer_type: str | None, parameters: Mapping[str, Any]
) -> PreTrainedConfig:
    """Copy `config` with other `rope_parameters`, for one layer type or for all."""
    changed = copy.deepcopy(config)
    if getattr(changed, "head_dim", 0) is None:  # some formulas need it
        changed.head_dim = changed.hidden_size // changed.num_attention_heads
    new = dict(parameters)
    changed.rope_parameters = (
        new if layer_type is None else dict(config.rope_parameters) | {layer_type: new}
    )
    return changed


def get_frequencies(module: RotaryModule, layer_type: str | None) -> tuple[torch.Tensor, float]:
    """Return radians per position [rotary width / 2], and the factor on cos and sin."""
    prefix = "" if layer_type is None else f"{layer_type}_"
    return (
        getattr(module, f"{prefix}inv_freq"),
        float(getattr(module, f"{prefix}attention_scaling", 1.0)),
    )


def compute_rotation(
    module: RotaryModule, like: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None
) -> Any:
    """Compute the `position_embeddings` that the model gives its attention: mostly (cos, sin).

    Args:
        like: a tensor with the wanted device and dtype.
        position_ids: [batch or 1, length].
    """
    if LAYER_TYPE in inspect.signature(module.forward).parameters:
        return module(like, position_ids, layer_type)
    return module(like, position_ids)
