"""Attention rows as probabilities, with what a row can see."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from surgery.observe import AttentionCall
from surgery.observe.rows import compute_row_logits, weigh_rows


@dataclass(frozen=True)
class Pattern:
    """Some query rows of one call.

    Attributes:
        rows: [R], the queries.
        logits: [B, H, R, S], masked entries -inf; with attention sinks, S includes their column.
        p: [B, H, R, S], softmax over S; zeros where a row sees nothing.
        visible: [B, R, S'], which keys a row sees; S' leaves the sinks' column out.
        weight: [B, R], 1 for rows that count: real queries that see two keys at least.
    """

    rows: torch.Tensor
    logits: torch.Tensor
    p: torch.Tensor
    visible: torch.Tensor
    weight: torch.Tensor

    @property
    def keys(self) -> torch.Tensor:
        """[B, H, R, S'], `p` without the sinks' column."""
        return self.p[..., : self.visible.shape[-1]]


def pattern(call: AttentionCall, rows: torch.Tensor) -> Pattern:
    """Query rows `rows` [R] of a call, exact and in fp32."""
    logits = compute_row_logits(call, rows)
    keys = call.key.shape[2]
    # Heads of one site see the same keys; a bias of -inf for one head alone is not known.
    visible = logits[:, 0, :, :keys] != float("-inf")
    p = torch.softmax(logits, dim=-1).nan_to_num(0.0)
    weight = weigh_rows(call, rows) * (visible.sum(-1) > 1)
    return Pattern(rows.to(logits.device), logits, p, visible, weight)
