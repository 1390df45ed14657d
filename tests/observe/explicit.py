"""The oracle: attention maps that transformers' eager attention returns, and their entropy."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from surgery.observe import AttentionCall, Tap
from surgery.observe.rows import compute_row_entropy, compute_row_logits


def entropy_of(p: torch.Tensor) -> torch.Tensor:
    """-Σ p log p over the last dimension, in float64."""
    return torch.special.entr(p.double()).sum(-1)


@torch.no_grad()
def explicit_maps(model: PreTrainedModel, **batch: Any) -> list[torch.Tensor]:
    """[B, Hq, N, S] of each layer of an eager model."""
    assert model.config._attn_implementation == "eager"
    maps = model(**batch, output_attentions=True, use_cache=False).attentions
    assert all(layer is not None for layer in maps)
    return list(maps)


@torch.no_grad()
def recorded_calls(model: PreTrainedModel, **batch: Any) -> list[AttentionCall]:
    """The attention calls of one forward pass, in order."""
    calls: list[AttentionCall] = []
    with Tap(model, calls.append):
        model(**batch)
    return calls


def entropies(call: AttentionCall, rows: torch.Tensor | None = None) -> torch.Tensor:
    """[B, Hq, R] as the monitors compute them; of all rows by default."""
    rows = torch.arange(call.query.shape[2]) if rows is None else rows
    return compute_row_entropy(compute_row_logits(call, rows))[0]


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got.double(), expected.double(), atol=2e-5, rtol=0)
