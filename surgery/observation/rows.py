"""Attention logits of chosen query rows: exact per row, whatever backend ran.

R of N rows cost R/N of the full map and need no N×N memory; the mean over rows drawn at random is
an unbiased estimate of the mean over all rows.
"""

from __future__ import annotations

import torch

from surgery.errors import TapError
from surgery.observation.tap import AttentionCall


def sample_rows(count: int, rows: int | None, generator: torch.Generator) -> torch.Tensor:
    """Sorted indices [R] of `rows` distinct query rows out of `count`; all for ``None``."""
    if rows is None or rows >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=generator)[:rows].sort().values


@torch.no_grad()
def row_logits(call: AttentionCall, rows: torch.Tensor) -> torch.Tensor:
    """Scaled, biased and masked logits [B, Hq, R, S] of query rows `rows` [R], in fp32.

    Masked entries are -inf. A model with attention sinks has one column more, the sink's.

    Raises:
        TapError: a mask of a kind that is not known.
    """
    rows = rows.to(call.query.device)
    logits = _scores(call, rows)
    batch, q_heads, count, _ = logits.shape
    softcap = call.options.get("softcap")
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    bias = call.options.get("position_bias")
    if bias is not None:
        logits = logits + bias.index_select(-2, rows).float()
    logits = _masked(call, logits, rows)
    sinks = call.options.get("s_aux")
    if sinks is not None:
        column = sinks.float().reshape(1, -1, 1, 1).expand(batch, q_heads, count, 1)
        logits = torch.cat([logits, column], dim=-1)
    return logits


def _scores(call: AttentionCall, rows: torch.Tensor) -> torch.Tensor:
    query = call.query.index_select(2, rows).float()
    key = call.key.float()
    batch, q_heads, count, dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    scaling = call.options.get("scaling")
    scaling = dim**-0.5 if scaling is None else scaling
    # Query head h attends with KV head h // group: neighbours share.
    grouped = query.reshape(batch, kv_heads, (q_heads // kv_heads) * count, dim)
    # The model may run under autocast, which would take this product back to half precision.
    with torch.autocast(query.device.type, enabled=False):
        scores = grouped @ key.transpose(-1, -2)
    return scores.reshape(batch, q_heads, count, keys) * scaling


def _masked(call: AttentionCall, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    mask = call.mask
    if mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        visible = _implied(call, rows, logits.shape[-1])
        if isinstance(mask, torch.Tensor):
            visible = visible & mask[:, None, None, -logits.shape[-1] :].bool()
        return logits.masked_fill(~visible, float("-inf"))
    if isinstance(mask, torch.Tensor) and mask.ndim == 4:
        mask = mask[..., : logits.shape[-1]]
        chosen = mask.index_select(2, rows) if mask.shape[2] > 1 else mask
        if chosen.dtype == torch.bool:
            return logits.masked_fill(~chosen, float("-inf"))
        # "Masked" is the smallest number of the mask's dtype, or -inf.
        hidden = chosen <= torch.finfo(chosen.dtype).min / 2
        return (logits + chosen.float()).masked_fill(hidden, float("-inf"))
    mask_mod = getattr(mask, "mask_mod", None)
    if mask_mod is not None:
        return logits.masked_fill(~_block_mask(mask_mod, logits, rows), float("-inf"))
    raise TapError(
        f"{call.site}: the tap does not understand a mask of type {type(mask).__name__} "
        f"under {call.implementation}"
    )


def _implied(call: AttentionCall, rows: torch.Tensor, keys: int) -> torch.Tensor:
    """What a backend applies by itself when it is given no map: [1 or B, 1, R, S]."""
    queries = call.query.shape[2]
    causal = call.options.get("is_causal")
    causal = getattr(call.module, "is_causal", True) if causal is None else causal
    key_index = torch.arange(keys, device=rows.device)
    visible = torch.ones(1, 1, len(rows), keys, dtype=torch.bool, device=rows.device)
    if call.implementation in ("eager", "flex_attention"):  # they add no mask of their own
        return visible
    if "flash" not in call.implementation:
        # sdpa aligns to the upper left, and lets a single (decoding) query see all.
        return visible & (key_index <= rows[:, None]) if causal and queries > 1 else visible
    # Flash aligns to the lower right, which differs from sdpa with a cache.
    position = (rows + keys - queries)[:, None]
    if causal:
        visible = visible & (key_index <= position)
    window = call.options.get("sliding_window")
    if window is not None:
        visible = visible & ((position - key_index).abs() < window)
    documents = _flash_documents(call) if call.mask is None and queries == keys else None
    if documents is not None:
        visible = visible & (documents[:, None, rows, None] == documents[:, None, None, :])
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


def _block_mask(mask_mod: object, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    batch, heads, _, keys = logits.shape
    device = logits.device
    index = (
        torch.arange(batch, device=device).view(-1, 1, 1, 1),
        torch.arange(heads, device=device).view(1, -1, 1, 1),
        rows.view(1, 1, -1, 1),
        torch.arange(keys, device=device).view(1, 1, 1, -1),
    )
    visible = mask_mod(*index)  # type: ignore[operator]
    return visible.expand(batch, heads, len(rows), keys)


def row_weights(call: AttentionCall, rows: torch.Tensor) -> torch.Tensor:
    """1.0 for real queries, 0.0 for padding: [B, R]."""
    batch, _, queries, _ = call.query.shape
    rows = rows.to(call.query.device)
    if call.query_mask is None:
        return torch.ones(batch, len(rows), device=call.query.device)
    mask = call.query_mask.to(call.query.device)[:, -queries:]
    return mask.index_select(1, rows).ne(0).float()
