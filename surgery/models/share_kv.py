"""Eager attention with shared KV heads, for architectures whose own eager code cannot do it.

Many architectures (BERT, GPT-2, BART, …) call attention through transformers' interface, which
repeats KV heads for every backend except their own eager code.
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
# Set on a model whose blocks share KV heads although their own eager code cannot.
_MARK = "_surgery_shares_kv"


def attend_with_shared_kv(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *args: Any,
    **options: Any,
) -> Any:
    """Run the architecture's own eager attention with each KV head repeated for its query heads.

    Args:
        query: [batch, heads, queries, head_dim].
        key, value: [batch, KV heads, keys, head_dim].
    """
    own = get_own_eager(module)
    if query.shape[1] != key.shape[1] and not repeats_kv(module):
        group = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(group, dim=1)
        value = value.repeat_interleave(group, dim=1)
    return own(module, query, key, value, attention_mask, *args, **options)


def get_own_eager(module: nn.Module) -> Callable[..., Any]:
    """Return the eager attention function of the file that defines the module's class."""
    functions = vars(sys.modules[type(module).__module__])
    attend: Callable[..., Any] = functions["eager_attention_forward"]
    return attend


def has_own_eager(module: nn.Module) -> bool:
    """Whether the module's class can attend through transformers' interface."""
    return "eager_attention_forward" in vars(sys.modules[type(module).__module__])


def repeats_kv(module: nn.Module) -> bool:
    """Whether the module's own eager attention repeats KV heads."""
    return "repeat_kv" in get_own_eager(module).__code__.co_names


def get_eager_implementation(model: PreTrainedModel) -> str:
    """Return the name of the eager attention implementation of this model."""
    return NAME if hasattr(model, _MARK) else "eager"


def use_shared_kv(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Replace eager by `eager_shared_kv` in every config of `model`; return the changed ones."""
    changed = []
    setattr(model, _MARK, True)
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and config._attn_implementation == "eager":
            config._attn_implementation = NAME
            changed.append(config)
    return changed


@contextmanager
def sharing_kv(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """Call `use_shared_kv` if `wanted`, and undo it after the block."""
    marked = hasattr(model, _MARK)
    changed = use_shared_kv(model) if wanted else []
    try:
        yield
    finally:
        if wanted and not marked:
            delattr(model, _MARK)
        for config in changed:
            config._attn_implementation = "eager"


AttentionInterface.register(NAME, attend_with_shared_kv)
AttentionMaskInterface.register(NAME, eager_mask)
