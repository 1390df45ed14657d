"""Llama and Mistral to Mistral and Phi-3: the same model, with a richer config or fused."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from transformers import PreTrainedConfig

from surgery.models.convert.pair import (
    ArchitecturePair,
    ConfigValue,
    Requirement,
    Rule,
    is_untied,
    make_copy_rule,
)

_LAYER = "model.layers.{layer}"
_ATTENTION = f"{_LAYER}.self_attn"
_MLP = f"{_LAYER}.mlp"

_AROUND = (
    make_copy_rule("model.embed_tokens.weight"),
    make_copy_rule("model.norm.weight"),
    make_copy_rule("lm_head.weight", when=is_untied),
    make_copy_rule(f"{_LAYER}.input_layernorm.weight"),
    make_copy_rule(f"{_LAYER}.post_attention_layernorm.weight"),
    make_copy_rule(f"{_ATTENTION}.o_proj.weight"),
    make_copy_rule(f"{_MLP}.down_proj.weight"),
)
_SEPARATE = (
    *_AROUND,
    *(make_copy_rule(f"{_ATTENTION}.{name}_proj.weight") for name in ("q", "k", "v")),
    *(make_copy_rule(f"{_MLP}.{name}_proj.weight") for name in ("gate", "up")),
)


def _get_qkv_sizes(config: PreTrainedConfig) -> dict[str, Any]:
    width = config.head_dim
    kv = config.num_key_value_heads * width
    return {"sizes": [config.num_attention_heads * width, kv, kv]}


_FUSED = (
    *_AROUND,
    Rule(
        "concat",
        tuple(f"{_ATTENTION}.{name}_proj.weight" for name in ("q", "k", "v")),
        (f"{_ATTENTION}.qkv_proj.weight",),
        _get_qkv_sizes,
    ),
    Rule(
        "concat",
        tuple(f"{_MLP}.{name}_proj.weight" for name in ("gate", "up")),
        (f"{_MLP}.gate_up_proj.weight",),
        lambda config: {"sizes": [config.intermediate_size] * 2},
    ),
)


def _require_no_bias(target: str) -> tuple[Requirement, ...]:
    return (
        Requirement("attention_bias", lambda c: not c.attention_bias, f"{target} has no biases"),
        Requirement("mlp_bias", lambda c: not c.mlp_bias, f"{target} has no biases"),
    )


# Neither Llama nor Mistral reads these, but the cache does.
_ALIKE = Requirement(
    "layer_types",
    lambda c: set(getattr(c, "layer_types", None) or ["full_attention"]) == {"full_attention"},
    "all layers must be alike",
)


def _rope_is_plain(config: PreTrainedConfig) -> bool:
    return config.rope_parameters.get("rope_type", "default") == "default"


# Phi-3 also has longrope, but then it resets its cache at the border, which Llama does not do.
_PLAIN_ROPE = Requirement("rope_parameters", _rope_is_plain, "Phi-3 has only the default RoPE")


def _make_rope_parameters(config: PreTrainedConfig) -> dict[str, Any]:
    """Make the parameters of the default RoPE: Phi-3 would use a partial factor, Llama does not."""
    return {
        "rope_type": "default",
        "rope_theta": config.rope_parameters["rope_theta"],
        "partial_rotary_factor": 1.0,
    }


_PHI3: dict[str, str | ConfigValue] = {
    "head_dim": "head_dim",
    "rope_parameters": _make_rope_parameters,
    "resid_pdrop": lambda config: 0.0,
    "embd_pdrop": lambda config: 0.0,
    # Beyond this length Phi-3 computes its cache again.
    "original_max_position_embeddings": "max_position_embeddings",
}

PAIRS = (
    ArchitecturePair(
        "llama",
        "mistral",
        (*_require_no_bias("Mistral"), _ALIKE),
        {
            "sliding_window": lambda config: None,
            "rope_parameters": lambda config: deepcopy(config.rope_parameters),
        },
        _SEPARATE,
    ),
    ArchitecturePair(
        "llama",
        "phi3",
        (*_require_no_bias("Phi-3"), _ALIKE, _PLAIN_ROPE),
        {**_PHI3, "sliding_window": lambda config: None},
        _FUSED,
    ),
    ArchitecturePair("mistral", "phi3", (_ALIKE, _PLAIN_ROPE), _PHI3, _FUSED),
)
