"""Small models that can move, each with where it goes and what stands in for its positions."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tests.families import VOCAB, family_config, randomised

_IDS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_OPT = {
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}

ABSOLUTE: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", _GPT),
    "gpt2_untied": ("gpt2", _GPT | {"tie_word_embeddings": False, "n_inner": 40}),
    "gpt_bigcode": ("gpt_bigcode", _GPT),
    "gpt_bigcode_heads": ("gpt_bigcode", _GPT | {"multi_query": False}),
    "opt": ("opt", _OPT),
    "opt_unbiased": ("opt", _OPT | {"enable_bias": False, "tie_word_embeddings": False}),
}
# Names of tests.families, and what differs.
ROTARY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 2}),
    "mistral": ("mistral", {"num_key_value_heads": 2}),
    "mistral_wide": ("mistral_wide", {}),
}
NOPE = {"nope": True}
ROPE = {"theta": 10000.0}

# (name, into, positions)
KEPT = [
    ("llama", "mistral"),
    ("llama_tied", "mistral"),
    ("llama", "phi3"),
    ("llama_tied", "phi3"),
    ("mistral", "phi3"),
    ("mistral_wide", "phi3"),
]
ALL = [(name, into, None) for name, into in KEPT] + [
    (name, "starcoder2", positions) for name in ABSOLUTE for positions in (ROPE, NOPE)
]


def config_of(name: str, **fields: Any) -> PreTrainedConfig:
    if name in ABSOLUTE:
        model_type, own = ABSOLUTE[name]
        return AutoConfig.for_model(model_type, **(_IDS | own | fields))
    family, own = ROTARY[name]
    return family_config(family, **(own | fields))


def model_of(name: str, dtype: torch.dtype = torch.float64, **fields: Any) -> PreTrainedModel:
    config = config_of(name, **fields)
    return randomised(AutoModelForCausalLM.from_config(config), 0, dtype)
