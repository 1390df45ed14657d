"""Copies of a model that have no weights, or share the model's weights."""

from __future__ import annotations

import copy
from itertools import chain

import torch
from torch import nn
from transformers import PreTrainedModel


def is_on_meta(model: nn.Module) -> bool:
    """Whether some weights are on the meta device: they have shapes but no values."""
    return any(parameter.is_meta for parameter in model.parameters())


def make_meta_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model to the meta device: modules, attributes, shapes and hooks, but no weights.

    The copy uses eager attention and is in eval mode.
    """
    memo: dict[int, object] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        hollow = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(hollow, tensor.requires_grad) if is_parameter else hollow
    copied = copy.deepcopy(model, memo)
    copied.config._attn_implementation = "eager"  # other implementations may need a GPU
    return copied.eval()


def make_sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Copy the modules of a model but share its tensors; the copy is in eval mode."""
    memo: dict[int, object] = {id(t): t for t in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, memo).eval()
