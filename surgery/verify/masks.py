"""Count the keys that each attention block lets a query see, with the model's mask functions.

The model runs on the meta device. transformers makes masks from functions of positions, and these
functions can be called for any position without making a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)

from surgery.models.copies import make_meta_copy
from surgery.models.probe import make_probe_inputs
from surgery.verify.equivalence import FAULTS

_NAME = "surgery_observed_mask"
# Attribute of a mask: the function that computes its values.
_FUNCTION = "_surgery_mask_function"


def count_visible_keys(model: PreTrainedModel, position: int) -> dict[str, int]:
    """Count for each attention block (by path) the keys that a query at `position` (from 0) sees.

    Without a window the count is ``position + 1``. Blocks that do not use transformers' attention
    interface, or are not reached on the meta device, are left out.

    Args:
        model: only its structure is used.
    """
    seen: dict[str, int] = {}
    queries = torch.tensor(position)
    keys = torch.arange(position + 1)

    def attend(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        *args: Any,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        function = getattr(mask, _FUNCTION, None)
        if function is not None:
            zero = torch.tensor(0)
            visible = function(zero, zero, queries, keys)
            seen[paths[id(module)]] = int(torch.as_tensor(visible).expand(position + 1).sum())
        batch, heads, length, _ = query.shape
        return query.new_empty(batch, length, heads, value.shape[-1]), None

    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, _make_mask)
    # In bf16, because the grouped products of experts do not run on meta in other dtypes.
    copied = make_meta_copy(model).to(torch.bfloat16)  # type: ignore[arg-type]
    paths = {id(module): path for path, module in copied.named_modules()}
    for module in copied.modules():
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            module.config._attn_implementation = _NAME
    with suppress(*FAULTS), torch.no_grad():
        # With a cache: without one, transformers looks for packed documents in missing values.
        copied(**{**make_probe_inputs(copied), "use_cache": True})
    return seen


def _make_mask(
    batch_size: int, q_length: int, kv_length: int, mask_function: Callable[..., Any], **_: Any
) -> torch.Tensor:
    mask = torch.empty(batch_size, 1, q_length, kv_length, device="meta")
    setattr(mask, _FUNCTION, mask_function)
    return mask
