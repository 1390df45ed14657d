"""The model and the batch that every variant trains on. Needs torch and transformers alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 259


@dataclass(frozen=True)
class Preset:
    """A random Llama with heads 64 wide, and how long it is watched.

    Attributes:
        lengths: tokens of the one row of a batch.
        rounds: of the longest; shorter ones have up to `more` times as many (`rounds_of`).
        blocks: pairs of 25 steps, with the default cadence and without; 4 have one picture.
        block_lengths: where there is time for those.
        memory_rounds: fresh processes per variant, of which the median counts.
    """

    name: str
    layers: int
    heads: int
    kv_heads: int
    lengths: tuple[int, ...]
    rounds: int
    blocks: int
    block_lengths: tuple[int, ...]
    memory_rounds: int
    head_dim: int = 64
    more: int = 4

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim

    def rounds_of(self, length: int) -> int:
        return self.rounds * max(1, min(self.more, 2048 // length))

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"hidden": self.hidden}


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("cpu", 2, 8, 4, (512, 1024, 2048, 4096), 5, 4, (512, 1024), 3),
        Preset("quick", 2, 2, 1, (64,), 1, 1, (64,), 1, head_dim=16, more=1),
    )
}


def build(preset: Preset, length: int, implementation: str) -> LlamaForCausalLM:
    """In fp32 on the CPU, in training mode; the same weights at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=preset.hidden,
        num_hidden_layers=preset.layers,
        intermediate_size=preset.hidden * 11 // 4,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.kv_heads,
        head_dim=preset.head_dim,
        max_position_embeddings=length,
        attn_implementation=implementation,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def batch(length: int) -> dict[str, torch.Tensor]:
    """One row of random tokens, and the same as labels."""
    ids = torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4)
