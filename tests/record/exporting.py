"""Operated models whose configs cannot say what they are."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from surgery.execute.live import apply_
from surgery.plan.make import make_plan
from surgery.plan.plan import Plan
from surgery.plan.registry import parse_operations
from tests.operations.zoo_models import build

# Name → kind, type, how it is built, and what is done to it.
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llama-gqa": ("causal-lm", "llama", {}, {"gqa": {"kv_heads": [2, 1]}}),
    "llama-prune": ("causal-lm", "llama", {}, {"prune_heads": {"heads": {0: [1], 1: [0, 3]}}}),
    "llama-tied": (
        "causal-lm",
        "llama",
        {"tie_word_embeddings": True},
        {"gqa": {"kv_heads": [1, 4]}, "prune_heads": {"heads": {1: [2]}}},
    ),
    "llama-removed": (
        "causal-lm",
        "llama",
        {},
        {"prune_heads": {"heads": {0: [0, 1, 2, 3], 1: [1]}, "remove_attention": True}},
    ),
    "gpt2-gqa": ("causal-lm", "gpt2", {}, {"gqa": {"kv_heads": 2}}),
    "gpt2-gqa-sdpa": ("causal-lm", "gpt2", {"attention": "sdpa"}, {"gqa": {"kv_heads": 2}}),
    "gpt2-prune": ("causal-lm", "gpt2", {}, {"prune_heads": {"heads": {0: [0], 1: [1, 2]}}}),
    "gpt_oss-prune": (
        "causal-lm",
        "gpt_oss",
        {"sliding_window": 64},
        {"prune_heads": {"heads": {1: [2]}}},
    ),
    "gpt_neox-prune": ("causal-lm", "gpt_neox", {}, {"prune_heads": {"heads": {1: [2]}}}),
    "opt-prune": ("causal-lm", "opt", {}, {"prune_heads": {"heads": {0: [2]}}}),
    "bert-gqa": ("masked-lm", "bert", {}, {"gqa": {"kv_heads": [4, 2]}}),
    "bart-prune": ("seq2seq-lm", "bart", {}, {"prune_heads": {"heads": {0: [1], 3: [2], 4: [0]}}}),
    "vit-prune": ("image-classification", "vit", {}, {"prune_heads": {"heads": {1: [1]}}}),
}
# Of the plans: tokens and bytes per cached value.
TOKENS, KV_BYTES = 9, 4
TEXT = [name for name, (kind, *_) in CASES.items() if kind == "causal-lm"]


def original(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    kind, model_type, options, _ = CASES[name]
    return build(kind, model_type, dtype=dtype, **options)


def exported(name: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Plan]:
    model = original(name, dtype)
    operations = parse_operations(CASES[name][3])
    plan = make_plan(model, operations, tokens=TOKENS, kv_bytes=KV_BYTES)
    assert plan.export.format == "record"
    return apply_(model, plan), plan
