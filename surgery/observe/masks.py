"""Who sees whom: what a backend makes of the mask it is given, or of none."""

from __future__ import annotations

from typing import Any

import torch

from surgery.errors import TapError
from surgery.observe.tap import AttentionCall

EVERY = slice(None)


def visible_keys(call: AttentionCall, rows: torch.Tensor, examples: slice = EVERY) -> torch.Tensor:
    """Which keys the query rows `rows` [R] see: bool [1 or b, 1 or Hq, R, S].

    Args:
        examples: which of the batch; b of them.

    Raises:
        TapError: a mask of a kind that is not known.
    """
    mask, keys = call.mask, call.key.shape[2]
    if isinstance(mask, torch.Tensor) and mask.ndim == 4:
        return ~hidden(added_mask(call, rows, examples))
    index = torch.arange(keys, device=rows.device)
    if mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        seen = _implied(call, rows[:, None], index, examples)
        if mask is not None:
            seen = seen & mask[examples, None, None, -keys:].bool()
        return seen
    return _block_mask(call, rows[:, None], index, examples)


def sees_previous(call: AttentionCall, examples: slice = EVERY) -> torch.Tensor | None:
    """Whether the query at each place sees the key right before it: bool [1 or b, S].

    Where it does not, a text begins: the batch's row, the text behind its padding, or the next
    of the packed documents. ``None`` where that is not to be known: with a cache, or across.
    """
    mask, count = call.mask, call.key.shape[2]
    if call.cross or call.query.shape[2] != count:
        return None
    key = torch.arange(count - 1, device=call.query.device)
    if isinstance(mask, torch.Tensor) and mask.ndim == 4:
        mask = part(mask, examples)[:, 0, :, :count].expand(-1, count, -1)
        seen = ~hidden(mask.diagonal(-1, 1, 2))
    elif mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        seen = _implied(call, key + 1, key, examples)[:, 0]
        if mask is not None:
            seen = seen & mask[examples, -count:-1].bool()
    else:
        seen = _block_mask(call, key + 1, key, examples)[:, 0]
    return torch.cat([torch.zeros_like(seen[:, :1]), seen], dim=1) if count > 1 else None


def added_mask(call: AttentionCall, rows: torch.Tensor, examples: slice) -> torch.Tensor:
    """The given rows of a 4-D mask, bool or float: [1 or b, 1 or Hq, R or 1, S]."""
    mask = part(call.mask, examples)[..., : call.key.shape[2]]
    return mask.index_select(2, rows) if mask.shape[2] > 1 else mask


def hidden(mask: torch.Tensor) -> torch.Tensor:
    if mask.dtype == torch.bool:
        return ~mask
    # "Masked" is the smallest number of the mask's dtype, or -inf.
    return mask <= torch.finfo(mask.dtype).min / 2


def part(tensor: torch.Tensor, examples: slice) -> torch.Tensor:
    """Those examples of [B, …]; what is the same for all is left as it is."""
    return tensor if tensor.shape[0] == 1 else tensor[examples]


def _implied(
    call: AttentionCall, query: torch.Tensor, key: torch.Tensor, examples: slice
) -> torch.Tensor:
    """What a backend applies by itself when it is given no map: [1 or b, 1, *query x key]."""
    queries, keys = call.query.shape[2], call.key.shape[2]
    causal = call.options.get("is_causal")
    causal = getattr(call.module, "is_causal", True) if causal is None else causal
    shape = torch.broadcast_shapes(query.shape, key.shape)
    visible = torch.ones(1, 1, *shape, dtype=torch.bool, device=key.device)
    if call.implementation in ("eager", "flex_attention"):  # they add no mask of their own
        return visible
    if "flash" not in call.implementation:
        # sdpa aligns to the upper left, and lets a single (decoding) query see all.
        return visible & (key <= query) if causal and queries > 1 else visible
    # Flash aligns to the lower right, which differs from sdpa with a cache.
    position = query + keys - queries
    if causal:
        visible = visible & (key <= position)
    window = call.options.get("sliding_window")
    if window is not None:
        visible = visible & ((position - key).abs() < window)
    documents = _flash_documents(call) if call.mask is None and queries == keys else None
    if documents is not None:
        documents = documents[examples, None]
        visible = visible & (documents[..., query] == documents[..., key.expand(shape)])
    return visible


def _flash_documents(call: AttentionCall) -> torch.Tensor | None:
    """[B, N], which document a token belongs to, as flash is told in an unpadded batch."""
    batch, _, queries, _ = call.query.shape
    bounds = call.options.get("cu_seq_lens_q")
    if bounds is not None:
        token = torch.arange(batch * queries, device=bounds.device).view(batch, queries)
        return torch.bucketize(token, bounds, right=True)
    positions = call.options.get("position_ids")
    # transformers reads packing from the positions in a batch of one only: in a larger batch
    # documents do attend to each other under flash.
    if positions is None or batch > 1:
        return None
    return (positions == positions.min()).cumsum(-1)


def _block_mask(
    call: AttentionCall, query: torch.Tensor, key: torch.Tensor, examples: slice
) -> torch.Tensor:
    """What flex's function of indices says: [b, Hq, *query x key]."""
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
