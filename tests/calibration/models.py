"""Tiny models whose calibration is tested, with what their positions allow."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
)

from surgery.calibration import Calibration, make_calibrated_plan
from surgery.plan.plan import Plan
from surgery.plan.registry import parse_operations
from tests.calibration.rewriting import Turning
from tests.families import randomised, tokens

VOCAB = 61
_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 8,
    "n_positions": 64,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
}

# Name → model type, config, and what may be done to a key head.
KINDS: dict[str, tuple[str, dict[str, Any], Turning]] = {
    "llama": ("llama", {"attention_bias": True}, Turning("half", 8)),
    "llama_yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
        Turning("half", 8),
    ),
    "gqa_16_to_8": ("llama", {"num_attention_heads": 16, "head_dim": 8}, Turning("half", 8)),
    "qwen2": ("qwen2", {}, Turning("half", 8)),
    "qwen3": ("qwen3", {"head_dim": 8}, Turning("half", 8, pure=True)),
    "cohere": ("cohere", {}, Turning("interleaved", 8)),
    "glm4": (
        "glm4",
        {"head_dim": 8, "attention_bias": True, "partial_rotary_factor": 0.5},
        Turning("interleaved", 4),
    ),
    "phi": ("phi", {"partial_rotary_factor": 0.5}, Turning("half", 4)),
    "stablelm": (
        "stablelm",
        {"use_qkv_bias": True, "partial_rotary_factor": 0.25},
        Turning("half", 2),
    ),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.5}, Turning("half", 4)),
    "phi3": ("phi3", {}, Turning("half", 8)),
    "gpt2": ("gpt2", _GPT2, Turning()),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 64}, Turning()),
    "bert": ("bert", {}, Turning()),
}
_FACTORIES = {"bert": AutoModelForMaskedLM}


def made(
    name: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, **fields: Any
) -> PreTrainedModel:
    """In eval mode, with uneven attention; biases and norms are not 0 and 1."""
    model_type, own, turning = KINDS[name]
    config = AutoConfig.for_model(model_type, **(_BASE | own | fields))
    factory = _FACTORIES.get(model_type, AutoModelForCausalLM)
    model = randomised(factory.from_config(config, attn_implementation="sdpa"), seed, torch.float64)
    if turning.pure:
        with torch.no_grad():
            for path, module in model.named_modules():
                if path.endswith(("q_norm", "k_norm")):
                    half = len(module.weight) // 2  # one gain per plane, so that it may be turned
                    module.weight[half:] = module.weight[:half]
    return model.to(dtype)


def batches(count: int = 4, size: int = 4, length: int = 24, seed: int = 100) -> list[Any]:
    return [{"input_ids": tokens(size, length, seed + n)} for n in range(count)]


def unseen() -> torch.Tensor:
    return tokens(3, 20, seed=7)


def plan_for(
    model: PreTrainedModel,
    data: list[Any] | None = None,
    options: Any = None,
    /,
    operations: Any = None,
    making: Any = None,
    **gqa: Any,
) -> Plan:
    """A calibrated plan for `gqa`, or for all of `operations`."""
    return make_calibrated_plan(
        model,
        parse_operations(operations or {"gqa": gqa}),
        batches() if data is None else data,
        options or Calibration(refine_steps=0),
        **(making or {}),
    )
