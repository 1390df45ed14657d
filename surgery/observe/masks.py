"""Which query sees which key: what a backend does with the mask it gets, or without one."""

from __future__ import annotations

from typing import Any

import torch

from surgery.errors import TapError
from surgery.observe.tap import AttentionCall

EVERY = slice(None)


def find_visible_keys(
    call: AttentionCall, rows: torch.Tensor, examples: slice = EVERY
) -> torch.Tensor:
    """Find the keys that the query rows `rows` [R] see: bool [1 or b, 1 or Hq, R, S].

    Args:
        examples: which examples of the batch; b of them.

    Raises:
        TapError: the type of the mask is unknown.
    """
    mask, keys = call.mask, call.key.shape[2]
    if isinstance(mask, torch.Tensor) and mask.ndim == 4:
        return ~is_hidden(select_mask_rows(call, rows, examples))
    index = torch.arange(keys, device=rows.device)
    if mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        seen = _find_implied(call, rows[:, None], index, examples)
        if mask is not None:
            seen = seen & mask[examples, None, None, -keys:].bool()
        return seen
    return _evaluate_block_mask(call, rows[:, None], index, examples)


def sees_previous(call: AttentionCall, examples: slice = EVERY) -> torch.Tensor | None:
    """Whether each query sees the key right before it: bool [1 or b, S].

    Where it does not, a text begins: at the start of the row, after padding, or at the next
    packed document. ``None`` where this is unknown: with a cache, or in cross-attention.
    """
    mask, count = call.mask, call.key.shape[2]
    if call.cross or call.query.shape[2] != count:
        return None
    key = torch.arange(count - 1, device=call.query.device)
    if isinstance(mask, torch.Tensor) and mask.ndim == 4:
        mask = select_examples(mask, examples)[:, 0, :, :count].expand(-1, count, -1)
        seen = ~is_hidden(mask.diagonal(-1, 1, 2))
    elif mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        seen = _find_implied(call, key + 1, key, examples)[:, 0]
        if mask is not None:
            seen = seen & mask[examples, -count:-1].bool()
    else:
        seen = _evaluate_block_mask(call, key + 1, key, examples)[:, 0]
    return torch.cat([torch.zeros_like(seen[:, :1]), seen], dim=1) if count > 1 else None


def select_mask_rows(call: AttentionCall, rows: torch.Tensor, examples: slice) -> torch.Tensor:
    """Select rows of a 4-D mask, bool or float: [1 or b, 1 or Hq, R or 1, S]."""
    mask = select_examples(call.mask, examples)[..., : call.key.shape[2]]
    return mask.index_select(2, rows) if mask.shape[2] > 1 else mask


def is_hidden(mask: torch.Tensor) -> torch.Tensor:
    if mask.dtype == torch.bool:
        return ~mask
    # Masked entries are the smallest number of the mask's dtype, or -inf.
    return mask <= torch.finfo(mask.dtype).min / 2


def select_examples(tensor: torch.Tensor, examples: slice) -> torch.Tensor:
    """Select examples of a tensor [B, …]; a tensor [1, …] that all share is returned as it is."""
    return tensor if tensor.shape[0] == 1 else tensor[examples]


def _find_implied(
    call: AttentionCall, query: torch.Tensor, key: torch.Tensor, examples: slice
) -> torch.Tensor:
    """Find what a backend shows by itself without a 4-D mask: [1 or b, 1, *query x key]."""
    queries, keys = call.query.shape[2], call.key.shape[2]
    causal = call.options.get("is_causal")
    causal = getattr(call.module, "is_causal", True) if causal is None else causal
    shape = torch.broadcast_shapes(query.shape, key.shape)
    visible = torch.ones(1, 1, *shape, dtype=torch.bool, device=key.device)
    if call.implementation in ("eager", "flex_attention"):  # these mask nothing by themselves
        return visible
    if "flash" not in call.implementation:
        # sdpa aligns to the upper left, and a single (decoding) query sees all keys.
        return visible & (key <= query) if causal and queries > 1 else visible
    # Flash aligns to the lower right. With a cache this differs from sdpa.
    position = query + keys - queries
    if causal:
        visible = visible & (key <= position)
    window = call.options.get("sliding_window")
    if window is not None:
        visible = visible & ((position - key).abs() < window)
    documents = _number_flash_documents(call) if call.mask is None and queries == keys else None
    if documents is not None:
        documents = documents[examples, None]
        visible = visible & (documents[..., query] == documents[..., key.expand(shape)])
    return visible


def _number_flash_documents(call: AttentionCall) -> torch.Tensor | None:
    """Number the document of each token [B, N] as flash does it in a batch without padding."""
    batch, _, queries, _ = call.query.shape
    bounds = call.options.get("cu_seq_lens_q")
    if bounds is not None:
        token = torch.arange(batch * queries, device=bounds.device).view(batch, queries)
        return torch.bucketize(token, bounds, right=True)
    positions = call.options.get("position_ids")
    # transformers reads packing from the positions only in a batch of one. In a larger batch,
    # packed documents attend to each other under flash.
    if positions is None or batch > 1:
        return None
    return (positions == positions.min()).cumsum(-1)


def _evaluate_block_mask(
    call: AttentionCall, query: torch.Tensor, key: torch.Tensor, examples: slice
) -> torch.Tensor:
    """Call the mask function of flex attention on the indices: [b, Hq, *query x key]."""
    mask_mod: Any = getattr(call.mask, "mask_mod", None)
    if mask_mod is None:
        raise TapError(
            f"{call.site}: the tap does not understand a mask of type "
            f"{type(call.mask).__name__} under {call.implementation}"
        )
    batch, heads = call.query.shape[:2]
    shape = torch.broadcast_shapes(query.shape, key.shape)
    ones = (1,) * len(shape)
    example = torch.arange(batch, device=key.device)[examples].view(-1, 1, *ones)
    head = torch.arange(heads, device=key.device).view(1, -1, *ones)
    visible: torch.Tensor = mask_mod(example, head, query, key)
    return visible.expand(len(example), heads, *shape)
