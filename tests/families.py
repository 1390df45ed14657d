"""Small random models of the architectures with separate projections, the same at every call."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import model_type_to_module_name

VOCAB = 61
HEADS = 8

_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WIDE = {"hidden_size": 32, "head_dim": 16}  # heads * head_dim is not hidden_size
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}

# Name → model type and what differs from `_BASE`.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_biased": ("llama", {"attention_bias": True, "tie_word_embeddings": True}),
    "arcee": ("arcee", {}),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", {"sliding_window": 6}),
    "ernie4_5": ("ernie4_5", {}),
    "exaone4": ("exaone4", {"sliding_window": 6}),
    "gemma": ("gemma", _WIDE),
    "gemma2": ("gemma2", _WIDE | {"query_pre_attn_scalar": 16, "sliding_window": 6}),
    "gemma3": ("gemma3_text", _WIDE | {"query_pre_attn_scalar": 16, "sliding_window": 6}),
    "glm4": ("glm4", {"head_dim": 8, "attention_bias": True}),
    "gpt_oss": (
        "gpt_oss",
        _LOCAL
        | {
            "head_dim": 8,
            "sliding_window": 6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "granite": ("granite", {}),
    "granitemoe": ("granitemoe", _LOCAL),
    "helium": ("helium", {"head_dim": 8}),
    "mistral": ("mistral", {"head_dim": 8, "sliding_window": 6}),
    "mistral_wide": ("mistral", _WIDE | {"sliding_window": None}),
    "mixtral": ("mixtral", _LOCAL),
    "nanochat": ("nanochat", {}),
    "olmo": ("olmo", {"clip_qkv": 2.0}),
    "olmo2": ("olmo2", {}),
    "olmoe": ("olmoe", _MOE),
    "phi": ("phi", {}),
    "phi_normed": ("phi", {"qk_layernorm": True}),
    "qwen2": ("qwen2", {}),
    "qwen2_moe": ("qwen2_moe", _MOE | {"shared_expert_intermediate_size": 16}),
    "qwen3": ("qwen3", _WIDE),
    "qwen3_moe": ("qwen3_moe", _WIDE | _MOE),
    "seed_oss": ("seed_oss", _WIDE),
    "smollm3": ("smollm3", {}),
    "stablelm": ("stablelm", {"use_qkv_bias": True}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
}
# Hybrids: only some layers have keys to share.
FAMILIES |= {
    "falcon_h1": (
        "falcon_h1",
        {
            "head_dim": 8,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 4,
        },
    ),
    "minimax": (
        "minimax",
        _LOCAL
        | {"head_dim": 8, "block_size": 8, "layer_types": ["linear_attention", "full_attention"]},
    ),
}
SEPARATE = list(FAMILIES)


def brings_own_attention(model_type: str) -> bool:
    """Whether its code does not ask transformers' attention interface; this differs by release."""
    module = model_type_to_module_name(model_type)
    code = import_module(f"transformers.models.{module}.modeling_{module}")
    return not hasattr(code, "ALL_ATTENTION_FUNCTIONS")


def family_config(name: str, **fields: Any) -> PreTrainedConfig:
    model_type, own = FAMILIES[name]
    return AutoConfig.for_model(model_type, **(_BASE | own | fields))


def family(
    name: str, *, seed: int = 0, dtype: torch.dtype = torch.float64, **fields: Any
) -> PreTrainedModel:
    """In eval mode. In fp64, so that what is equal is equal to far below 1e-6."""
    config = family_config(name, **fields)
    # torch's grouped matrix product knows no fp64.
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    return randomised(model, seed, dtype)


def masked_lm(model_type: str, **fields: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(model_type, **(_BASE | fields))
    return randomised(AutoModelForMaskedLM.from_config(config), 0, torch.float64)


def randomised(model: PreTrainedModel, seed: int, dtype: torch.dtype) -> PreTrainedModel:
    """Weights wide enough for uneven attention; norms and biases that are not 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.2 if parameter.ndim > 1 else parameter + noise * 0.2)
    return model.to(dtype).eval()


def skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """The same on the meta device."""
    with torch.device("meta"):
        return type(model)(model.config)


def tokens(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """[batch, length] of token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor | None = None) -> torch.Tensor:
    return model(input_ids=tokens() if ids is None else ids, use_cache=False).logits
