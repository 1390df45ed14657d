"""How spread out each head's attention is, while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch

from surgery.errors import ConfigError
from surgery.observation import AttentionCall
from surgery.observation.entropy import row_entropy
from surgery.observation.rows import row_logits, row_weights, sample_rows

from .head_monitor import HeadMonitor


class AttentionEntropy(HeadMonitor):
    """Mean entropy of each query head's attention over sampled query rows.

    Logs `attention_entropy` (nats); the table also has `normalized_entropy`, the mean over rows
    of entropy / log(visible keys), in [0, 1]. Queries that the batch's `attention_mask` marks as
    padding do not count.

    Args:
        every_n_steps, heatmap_every_n_steps: see `HeadMonitor`.
        rows: query rows drawn per step (the same for all layers); ``None`` for all of them.
        seed: of the draw; with the step, decides the rows.
    """

    name = "attention_entropy"
    metrics = ("attention_entropy", "normalized_entropy")

    def __init__(
        self,
        every_n_steps: int = 25,
        heatmap_every_n_steps: int = 100,
        rows: int | None = 64,
        seed: int = 0,
    ) -> None:
        super().__init__(every_n_steps, heatmap_every_n_steps)
        if rows is not None and (not isinstance(rows, int) or rows < 1):
            raise ConfigError(
                f"{self.name}.rows", "must be a whole number, at least 1, or null for all",
                given=rows,
            )  # fmt: skip
        self.sampled_rows = rows
        self.seed = seed
        self._row_seed = seed

    def start_step(self, trainer: pl.Trainer, batch: Mapping[str, Any], step: int) -> None:
        self._row_seed = self.seed * 1_000_003 + step

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor
    ) -> None:
        if self._tap is not None:  # under gradient checkpointing, backward runs attention again
            self._tap.close()

    @torch.no_grad()
    def observe(self, call: AttentionCall) -> None:
        generator = torch.Generator().manual_seed(self._row_seed)
        rows = sample_rows(call.query.shape[2], self.sampled_rows, generator)
        entropy, normalized, visible = row_entropy(row_logits(call, rows))
        weights = row_weights(call, rows)[:, None, :]
        seen = weights * (visible > 0)
        several = weights * (visible > 1)
        self._sums.add(
            call.site,
            {
                "attention_entropy": ((entropy * seen).sum((0, 2)), seen.sum((0, 2))),
                "normalized_entropy": ((normalized * several).sum((0, 2)), several.sum((0, 2))),
            },
        )
