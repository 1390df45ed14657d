"""Entropy of attention rows."""

from __future__ import annotations

import torch


def row_entropy(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Entropy H = lse - Σ p·s of each row, and its share of the highest it could be.

    Args:
        logits: [B, H, R, S], masked entries -inf.

    Returns:
        entropy [B, H, R] in nats; normalized [B, H, R] = entropy / log(visible keys), zero where
        a row sees one key; visible [B, H, R], the number of keys it sees (zero: a row that sees
        nothing, whose entropy is given as zero). A row with a NaN logit has a NaN entropy.
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
