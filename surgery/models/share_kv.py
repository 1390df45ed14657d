"""Eager attention whose KV heads are shared, for architectures whose own cannot.

Many architectures (BERT, GPT-2, BART, …) call attention through transformers' interface, which
repeats KV heads for every backend; only their own eager code has never heard of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import eager_mask

NAME = "eager_shared_kv"
# On a model whose blocks share KV heads though their own eager code does not know how.
_MARK = "_surgery_shares_kv"


def eager_shared_kv(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *args: Any,
    **options: Any,
) -> Any:
    """The architecture's own eager attention, each KV head repeated for its query heads.

    Args:
        query: [batch, heads, queries, head_dim].
        key, value: [batch, KV heads, keys, head_dim].
    """
    own = own_eager(module)
    if query.shape[1] != key.shape[1] and not repeats_itself(module):
        group = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(group, dim=1)
        value = value.repeat_interleave(group, dim=1)
    return own(module, query, key, value, attention_mask, *args, **options)


def own_eager(module: nn.Module) -> Callable[..., Any]:
    """The eager attention function of the file that defines the module's class."""
    found: Callable[..., Any] = vars(sys.modules[type(module).__module__])[
        "eager_attention_forward"
    ]
    return found


def has_own_eager(module: nn.Module) -> bool:
    """Whether the module's class can attend through transformers' interface at all."""
    return "eager_attention_forward" in vars(sys.modules[type(module).__module__])


def repeats_itself(module: nn.Module) -> bool:
    """Whether its own eager attention repeats KV heads."""
    return "repeat_kv" in own_eager(module).__code__.co_names


def eager_of(model: PreTrainedModel) -> str:
    """The attention implementation that is eager for this model."""
    return NAME if hasattr(model, _MARK) else "eager"


def use_shared_kv(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Replace eager by `eager_shared_kv` in every config of `model`; returns those changed."""
    changed = []
    setattr(model, _MARK, True)
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and config._attn_implementation == "eager":
            config._attn_implementation = NAME
            changed.append(config)
    return changed


@contextmanager
def shared_kv(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """The same for a while, if `wanted`."""
    marked = hasattr(model, _MARK)
    changed = use_shared_kv(model) if wanted else []
    try:
        yield
    finally:
        if wanted and not marked:
            delattr(model, _MARK)
        for config in changed:
            config._attn_implementation = "eager"


AttentionInterface.register(NAME, eager_shared_kv)
AttentionMaskInterface.register(NAME, eager_mask)
