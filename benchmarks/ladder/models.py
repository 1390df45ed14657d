"""One random Llama, and the rungs that plans make of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from surgery import apply_, make_plan, parse_operations

SEED = 0
BASELINE = "baseline"
GQA = "gqa"
FUSED = ("fused_phi3", "fused_live")  # two ways to the last rung
# What a rung should compute the same as. GQA is another function, on purpose.
SAME_AS = {"fast": BASELINE, "fused_phi3": GQA, "fused_live": GQA}
# The ladder as published, for a forward pass with 32 heads.
PUBLISHED = {BASELINE: 1.0, "fast": 2.5, GQA: 3.3, "fused": 4.0}

_FAST = {"backend": {"implementation": "fast", "check": False}}


@dataclass(frozen=True)
class Preset:
    """The model's shape, and how it is measured.

    Attributes:
        decode_tokens: tokens decoded per timing.
        probe_bytes: size of the tensors whose copying gives the memory bandwidth.
        lengths: those measured unless told otherwise.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    dtype: str
    device: str
    batch: int
    decode_tokens: int
    probe_bytes: int
    lengths: tuple[int, ...]

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads

    def to_json(self) -> dict[str, Any]:
        shown = {**vars(self), "head_dim": self.head_dim}
        del shown["lengths"]
        return shown


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "cpu",
            1024,
            2752,
            2,
            32,
            8,
            2048,
            "float32",
            "cpu",
            1,
            16,
            2**30,
            (512, 1024, 2048, 4096),
        ),
        # Layers of Llama-2-7B, eight of its 32.
        Preset(
            "gpu",
            4096,
            11008,
            8,
            32,
            8,
            2048,
            "bfloat16",
            "cuda",
            1,
            32,
            2**32,
            (512, 1024, 2048, 4096, 8192, 16384, 32768),
        ),
        Preset("tiny", 64, 176, 2, 8, 2, 64, "float32", "cpu", 1, 2, 2**24, (32, 64)),
    )
}


def operations(preset: Preset) -> dict[str, dict[str, Any]]:
    """`attention.*` of each rung, as a config would say it."""
    gqa = {"gqa": {"kv_heads": preset.kv_heads}}
    return {
        BASELINE: {"backend": {"implementation": "eager", "check": False}},
        "fast": _FAST,
        GQA: gqa | _FAST,
        "fused_phi3": {"rehouse": {"into": "phi3"}} | gqa | _FAST,
        "fused_live": gqa | {"fuse_qkv": {}} | _FAST,
    }


def climb(preset: Preset, longest: int) -> dict[str, PreTrainedModel]:
    """The model of each rung, all from the same weights; planned, checked, applied."""
    config = LlamaConfig(
        vocab_size=preset.vocabulary,
        hidden_size=preset.hidden_size,
        intermediate_size=preset.intermediate_size,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.heads,
        max_position_embeddings=longest + preset.decode_tokens,
        pad_token_id=None,
    )
    torch.manual_seed(SEED)
    source = LlamaForCausalLM(config).to(preset.device, getattr(torch, preset.dtype)).eval()
    models: dict[str, PreTrainedModel] = {}
    for name, attention in operations(preset).items():
        model = copy.deepcopy(source)
        plan = make_plan(model, parse_operations(attention), name=name, device=preset.device)
        models[name] = apply_(model, plan).eval()
    return models


def backends(models: Mapping[str, PreTrainedModel]) -> dict[str, str]:
    """Which attention each rung really runs."""
    return {name: str(model.config._attn_implementation) for name, model in models.items()}


@torch.no_grad()
def differences(models: Mapping[str, PreTrainedModel], tokens: torch.Tensor) -> dict[str, float]:
    """Root mean square of the logits' difference / standard deviation of what is right."""
    found = {}
    for name, reference in SAME_AS.items():
        expected = models[reference](input_ids=tokens, use_cache=False).logits.double()
        logits = models[name](input_ids=tokens, use_cache=False).logits.double()
        error = (logits - expected).square().mean().sqrt() / expected.std()
        found[f"{name} / {reference}"] = float(error)
    return found
