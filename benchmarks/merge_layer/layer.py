"""One random attention layer, and windows of inputs that are correlated as hidden states are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from surgery.models.sites import Site, find_sites

SEED = 0
# Hidden states: the variance of feature i falls as i^-DECAY; neighbours correlate.
DECAY = 1.0
NEIGHBOURS = 0.7


@dataclass(frozen=True)
class Preset:
    """The layer's shape, and the data its statistics stand for.

    Attributes:
        windows, length, rows: the data meant: so many windows of so many positions, from each of
            which so many query rows are drawn.
        measured: windows that are really run. All their query rows count then, as far as the rows
            of all windows need them, so that the statistics have the rank that they would have.
    """

    name: str
    hidden: int
    heads: int
    kv_heads: int
    windows: int
    length: int
    rows: int
    measured: int

    @property
    def measured_rows(self) -> int:
        return min(self.length, -(-self.windows * self.rows // self.measured))

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "head_dim": self.hidden // self.heads,
            "measured_rows": self.measured_rows,
        }


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("llama-2-7b", 4096, 32, 8, 128, 2048, 64, 4),
        Preset("tiny", 64, 8, 2, 8, 64, 16, 2),
    )
}


def build(preset: Preset) -> tuple[PreTrainedModel, Site]:
    """A Llama that is one attention layer and little else; fp32."""
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=preset.hidden,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.heads,
        max_position_embeddings=preset.length,
        pad_token_id=None,
    )
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(config).eval()
    (site,) = find_sites(model).sites
    return model, site


def windows(preset: Preset, count: int) -> Iterator[dict[str, torch.Tensor]]:
    """The same ones each time."""
    generator = torch.Generator().manual_seed(SEED + 1)
    spread = torch.arange(1, preset.hidden + 1).float().pow(-DECAY / 2)
    for _ in range(count):
        noise = torch.randn(1, preset.length, preset.hidden, generator=generator) * spread
        for at in range(1, preset.length):
            noise[:, at] *= (1 - NEIGHBOURS**2) ** 0.5
            noise[:, at].add_(noise[:, at - 1], alpha=NEIGHBOURS)
        yield {"inputs_embeds": noise}
