"""Flash attention's documented semantics in plain torch, for machines without its kernels.

Everything around the kernels (masks, unpadding, packing, windows) is transformers' own code.
https://github.com/Dao-AILab/flash-attention#how-to-use-flashattention
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, modeling_flash_attention_utils

Window = tuple[int, int]


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    window: Window,
    softcap: float,
) -> torch.Tensor:
    """One sequence: q [N, Hq, D], k and v [S, Hkv, D]; masks are aligned to the lower right."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("nhd,shd->hns", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    n, s = len(q), len(k)
    distance = torch.arange(n)[:, None] + s - n - torch.arange(s)  # > 0: the key lies behind
    left, right = window
    right = 0 if causal else right
    hidden = torch.zeros(n, s, dtype=torch.bool)
    if left >= 0:
        hidden |= distance > left
    if right >= 0:
        hidden |= -distance > right
    return torch.einsum("hns,shd->nhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float = 1.0,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> torch.Tensor:
    return torch.stack(
        [
            _attend(*sequence, softmax_scale, causal, window_size, softcap)
            for sequence in zip(q, k, v, strict=True)
        ]
    )


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float = 1.0,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> torch.Tensor:
    lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    sequences = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    return torch.cat(
        [_attend(*each, softmax_scale, causal, window_size, softcap) for each in sequences]
    )


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers find these kernels where it looks for flash-attn's."""
    module = modeling_flash_attention_utils

    def imports(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return flash_attn_func, flash_attn_varlen_func, None, module._pad_input, module._unpad_input

    monkeypatch.setattr(module, "_lazy_imports", imports)
    monkeypatch.setattr(module, "_loaded_implementation", None)


def use_flash(model: PreTrainedModel) -> PreTrainedModel:
    """Past the check that flash-attn is installed."""
    model.config._attn_implementation = "flash_attention_2"
    return model
