"""Copies of a model that hold none of its numbers, or share them."""

from __future__ import annotations

import copy
from itertools import chain

import torch
from torch import nn
from transformers import PreTrainedModel


def on_meta(model: nn.Module) -> bool:
    """Whether some of its weights have shapes and no values."""
    return any(parameter.is_meta for parameter in model.parameters())


def meta_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy on the meta device, eager and in eval mode: module tree, attributes, shapes, hooks."""
    memo: dict[int, object] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        hollow = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(hollow, tensor.requires_grad) if is_parameter else hollow
    copied = copy.deepcopy(model, memo)
    copied.config._attn_implementation = "eager"  # others may need a GPU
    return copied.eval()


def sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose modules are its own and whose tensors are the model's, in eval mode."""
    memo: dict[int, object] = {id(t): t for t in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, memo).eval()
