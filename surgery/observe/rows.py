"""Attention logits of selected query rows: exact for each row, whatever backend ran.

R of N rows cost R/N of the full map and need no N×N memory. The mean over rows drawn at random is
an unbiased estimate of the mean over all rows.
"""

from __future__ import annotations

import torch

from surgery.observe.masks import (
    EVERY,
    find_visible_keys,
    is_hidden,
    select_examples,
    select_mask_rows,
)
from surgery.observe.tap import AttentionCall


def sample_rows(count: int, rows: int | None, generator: torch.Generator) -> torch.Tensor:
    """Draw `rows` distinct query rows out of `count`: sorted indices [R]; ``None``: all rows."""
    if rows is None or rows >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=generator)[:rows].sort().values


@torch.no_grad()
def compute_row_logits(call: AttentionCall, rows: torch.Tensor) -> torch.Tensor:
    """Compute scaled, biased and masked logits [B, Hq, R, S] of query rows `rows` [R], in fp32.

    Masked entries are -inf. A model with attention sinks has one more column, for the sink.

    Raises:
        TapError: the type of the mask is unknown.
    """
    rows = rows.to(call.query.device)
    logits = compute_key_logits(call, rows, find_visible_keys(call, rows))
    sinks = get_sink_logits(call)
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, column], dim=-1)
    return logits


@torch.no_grad()
def compute_key_logits(
    call: AttentionCall,
    rows: torch.Tensor,
    visible: torch.Tensor,
    examples: slice = EVERY,
    floor: float = float("-inf"),
) -> torch.Tensor:
    """Compute logits [b, Hq, R, S] as `compute_row_logits` does, but only of real keys.

    Args:
        rows: indices [R], on the device of the call.
        visible: the result of `find_visible_keys`.
        floor: the logit of keys that a row does not see.
    """
    logits = _compute_scores(call, rows, examples)
    softcap = call.options.get("softcap")
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    bias = call.options.get("position_bias")
    if bias is not None:
        logits += select_examples(bias, examples).index_select(-2, rows).float()
    mask = call.mask
    if isinstance(mask, torch.Tensor) and mask.ndim == 4 and mask.is_floating_point():
        added = select_mask_rows(call, rows, examples)
        logits += added.masked_fill(is_hidden(added), 0.0)
    highest = torch.full(visible.shape, float("inf"), device=logits.device)
    highest.masked_fill_(~visible, floor)
    return torch.minimum(logits, highest, out=logits)  # several times faster than masked_fill_


def get_sink_logits(call: AttentionCall) -> torch.Tensor | None:
    """Return the logit [Hq] of each head's attention sink; ``None`` in a model without sinks."""
    sinks = call.options.get("s_aux")
    return None if sinks is None else sinks.detach().float()


def _compute_scores(call: AttentionCall, rows: torch.Tensor, examples: slice) -> torch.Tensor:
    query = call.query[examples].index_select(2, rows).float()
    key = call.key[examples].float()
    batch, q_heads, count, dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    scaling = call.options.get("scaling")
    scaling = dim**-0.5 if scaling is None else scaling
    # Query head h attends with KV head h // group: neighbouring heads share.
    grouped = (query * scaling).reshape(batch, kv_heads, (q_heads // kv_heads) * count, dim)
    # The model may run under autocast, which would compute this product in half precision.
    with torch.autocast(query.device.type, enabled=False):
        scores = grouped @ key.transpose(-1, -2)
    return scores.reshape(batch, q_heads, count, keys)


def weigh_rows(call: AttentionCall, rows: torch.Tensor, examples: slice = EVERY) -> torch.Tensor:
    """Weigh the rows of each example [b, R]: 1.0 for real queries, 0.0 for padding."""
    queries = call.query.shape[2]
    rows = rows.to(call.query.device)
    if call.query_mask is None:
        batch = call.query[examples].shape[0]
        return torch.ones(batch, len(rows), device=call.query.device)
    mask = call.query_mask.to(call.query.device)[examples, -queries:]
    return mask.index_select(1, rows).ne(0).float()


def compute_row_entropy(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the entropy H = lse - Σ p·s of each row, also relative to its highest value.

    Args:
        logits: [B, H, R, S], masked entries -inf.

    Returns:
        entropy [B, H, R] in nats; normalized [B, H, R] = entropy / log(visible keys), zero where
        a row sees one key; visible [B, H, R], the number of keys that the row sees. A row that
        sees no key has entropy zero. A row with a NaN logit has a NaN entropy.
    """
    visible = (logits != float("-inf")).sum(-1)
    log_p = torch.log_softmax(logits, dim=-1)
    p = log_p.exp()
    entropy = -torch.where(p == 0, torch.zeros_like(p), p * log_p).sum(-1)
    entropy = entropy.clamp_min(0)
    entropy = torch.where(visible > 0, entropy, torch.zeros_like(entropy))
    highest = visible.clamp_min(2).log()
    normalized = torch.where(visible > 1, entropy / highest, torch.zeros_like(entropy))
    return entropy, normalized, visible
