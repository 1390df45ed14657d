"""What attention costs, counted from sites alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from surgery.anatomy import Site


@dataclass(frozen=True)
class Sizes:
    """Predicted or counted sizes of a model.

    Attributes:
        parameters: of the whole model, shared ones once.
        kv_bytes_per_token: cache growth per token over all layers.
        attention_flops: forward pass of all attention blocks over one window, projections
            included (a multiply-add counts as two).
    """

    parameters: int
    kv_bytes_per_token: int
    attention_flops: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def kv_bytes_per_token(sites: Iterable[Site], bytes_per_value: int) -> int:
    """Sum over cached sites of 2 · kv_heads · head_dim · bytes."""
    return sum(s.kv_heads * (s.head_dim + s.value_dim) * bytes_per_value for s in sites if s.cached)


def attention_flops(sites: Iterable[Site], tokens: int) -> int:
    """Scores and weighted sum 4·N²·Hq·d (half where causal) plus projections 2·N·D·d·(2Hq+2Hkv)."""
    total = 0
    for site in sites:
        scores = 4 * tokens * tokens * site.q_heads * site.head_dim
        total += scores // 2 if site.cached else scores
        heads = 2 * site.q_heads + 2 * site.kv_heads
        total += 2 * tokens * site.hidden_size * site.head_dim * heads
    return total
