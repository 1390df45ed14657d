"""Attention logits of chosen query rows: exact per row, whatever backend ran.

R of N rows cost R/N of the full map and need no N×N memory; the mean over rows drawn at random is
an unbiased estimate of the mean over all rows.
"""

from __future__ import annotations

import torch

from surgery.observe.masks import EVERY, added_mask, hidden, part, visible_keys
from surgery.observe.tap import AttentionCall


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
    logits = key_logits(call, rows, visible_keys(call, rows))
    sinks = sink_logits(call)
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, column], dim=-1)
    return logits


@torch.no_grad()
def key_logits(
    call: AttentionCall,
    rows: torch.Tensor,
    visible: torch.Tensor,
    examples: slice = EVERY,
    floor: float = float("-inf"),
) -> torch.Tensor:
    """Logits [b, Hq, R, S] as of `row_logits`, of real keys alone.

    Args:
        rows: on the call's device.
        visible: as `visible_keys` gives it.
        floor: the logit of keys that a row does not see.
    """
    logits = _scores(call, rows, examples)
    softcap = call.options.get("softcap")
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    bias = call.options.get("position_bias")
    if bias is not None:
        logits += part(bias, examples).index_select(-2, rows).float()
    mask = call.mask
    if isinstance(mask, torch.Tensor) and mask.ndim == 4 and mask.is_floating_point():
        added = added_mask(call, rows, examples)
        logits += added.masked_fill(hidden(added), 0.0)
    highest = torch.full(visible.shape, float("inf"), device=logits.device)
    highest.masked_fill_(~visible, floor)
    return torch.minimum(logits, highest, out=logits)  # several times faster than to fill


def sink_logits(call: AttentionCall) -> torch.Tensor | None:
    """[Hq], the logit that each head gives to no key at all, in models that have such."""
    sinks = call.options.get("s_aux")
    return None if sinks is None else sinks.detach().float()


def _scores(call: AttentionCall, rows: torch.Tensor, examples: slice) -> torch.Tensor:
    query = call.query[examples].index_select(2, rows).float()
    key = call.key[examples].float()
    batch, q_heads, count, dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    scaling = call.options.get("scaling")
    scaling = dim**-0.5 if scaling is None else scaling
    # Query head h attends with KV head h // group: neighbours share.
    grouped = (query * scaling).reshape(batch, kv_heads, (q_heads // kv_heads) * count, dim)
    # The model may run under autocast, which would take this product back to half precision.
    with torch.autocast(query.device.type, enabled=False):
        scores = grouped @ key.transpose(-1, -2)
    return scores.reshape(batch, q_heads, count, keys)


def row_weights(call: AttentionCall, rows: torch.Tensor, examples: slice = EVERY) -> torch.Tensor:
    """1.0 for real queries, 0.0 for padding: [b, R]."""
    queries = call.query.shape[2]
    rows = rows.to(call.query.device)
    if call.query_mask is None:
        batch = call.query[examples].shape[0]
        return torch.ones(batch, len(rows), device=call.query.device)
    mask = call.query_mask.to(call.query.device)[examples, -queries:]
    return mask.index_select(1, rows).ne(0).float()
