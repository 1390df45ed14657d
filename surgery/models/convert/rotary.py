"""Llama and Mistral into Mistral and Phi-3: the same model, with more in the config, or fused."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from transformers import PreTrainedConfig

from surgery.models.convert.pair import Need, Of, Pair, Rule, copies, is_untied

_LAYER = "model.layers.{layer}"
_ATTENTION = f"{_LAYER}.self_attn"
_MLP = f"{_LAYER}.mlp"

_AROUND = (
    copies("model.embed_tokens.weight"),
    copies("model.norm.weight"),
    copies("lm_head.weight", when=is_untied),
    copies(f"{_LAYER}.input_layernorm.weight"),
    copies(f"{_LAYER}.post_attention_layernorm.weight"),
    copies(f"{_ATTENTION}.o_proj.weight"),
    copies(f"{_MLP}.down_proj.weight"),
)
_SEPARATE = (
    *_AROUND,
    *(copies(f"{_ATTENTION}.{name}_proj.weight") for name in ("q", "k", "v")),
    *(copies(f"{_MLP}.{name}_proj.weight") for name in ("gate", "up")),
)


def _qkv(config: PreTrainedConfig) -> dict[str, Any]:
    width = config.head_dim
    kv = config.num_key_value_heads * width
    return {"sizes": [config.num_attention_heads * width, kv, kv]}


_FUSED = (
    *_AROUND,
    Rule(
        "concat",
        tuple(f"{_ATTENTION}.{name}_proj.weight" for name in ("q", "k", "v")),
        (f"{_ATTENTION}.qkv_proj.weight",),
        _qkv,
    ),
    Rule(
        "concat",
        tuple(f"{_MLP}.{name}_proj.weight" for name in ("gate", "up")),
        (f"{_MLP}.gate_up_proj.weight",),
        lambda config: {"sizes": [config.intermediate_size] * 2},
    ),
)


def _unbiased(target: str) -> tuple[Need, ...]:
    return (
        Need("attention_bias", lambda c: not c.attention_bias, f"{target} has no biases"),
        Need("mlp_bias", lambda c: not c.mlp_bias, f"{target} has no biases"),
    )


# Neither Llama nor Mistral reads these, but the cache does, and what is kept decides.
_ALIKE = Need(
    "layer_types",
    lambda c: set(getattr(c, "layer_types", None) or ["full_attention"]) == {"full_attention"},
    "only layers that are all alike can be moved",
)


def _rope_is_plain(config: PreTrainedConfig) -> bool:
    return config.rope_parameters.get("rope_type", "default") == "default"


# Phi-3 also takes longrope, but then starts its cache anew at the border, which Llama does not.
_PLAIN_ROPE = Need("rope_parameters", _rope_is_plain, "Phi-3 has none but the default RoPE")


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    """Llama and Mistral pass over a partial factor in the default RoPE; Phi-3 would not."""
    return {
        "rope_type": "default",
        "rope_theta": config.rope_parameters["rope_theta"],
        "partial_rotary_factor": 1.0,
    }


_PHI3: dict[str, str | Of] = {
    "head_dim": "head_dim",
    "rope_parameters": _rope,
    "resid_pdrop": lambda config: 0.0,
    "embd_pdrop": lambda config: 0.0,
    # Beyond it Phi-3 computes its cache anew.
    "original_max_position_embeddings": "max_position_embeddings",
}

PAIRS = (
    Pair(
        "llama",
        "mistral",
        (*_unbiased("Mistral"), _ALIKE),
        {
            "sliding_window": lambda config: None,
            "rope_parameters": lambda config: deepcopy(config.rope_parameters),
        },
        _SEPARATE,
    ),
    Pair(
        "llama",
        "phi3",
        (*_unbiased("Phi-3"), _ALIKE, _PLAIN_ROPE),
        {**_PHI3, "sliding_window": lambda config: None},
        _FUSED,
    ),
    Pair("mistral", "phi3", (_ALIKE, _PLAIN_ROPE), _PHI3, _FUSED),
)
