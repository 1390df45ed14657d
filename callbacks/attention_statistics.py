"""Statistics of each head's attention during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pytorch_lightning as pl
import torch

from surgery.errors import ConfigError
from surgery.observe import AttentionCall
from surgery.observe.rows import sample_rows
from surgery.observe.statistics import MAXIMA, ROOTS, STATISTICS, compute_head_statistics
from surgery.observe.tap import runs_in_backward

from .head_monitor import HeadMonitor


class AttentionStatistics(HeadMonitor):
    """Entropy, largest logit, and where the attention of each query head goes.

    `surgery.observe.statistics.STATISTICS` defines the metrics. They are exact on sampled query
    rows. Queries that the batch's `attention_mask` marks as padding do not count. Metrics about
    equal tokens need `input_ids` in the batch, and are null without it.

    Args:
        every_n_steps, heatmap_every_n_steps: see `HeadMonitor`.
        rows: query rows drawn per step (the same for all layers); ``None`` or ``"all"`` for all.
        seed: together with the step, decides the rows.
        metrics: names of metrics; ``None`` for all.

    Raises:
        ConfigError: an option is invalid.
    """

    name = "attention_statistics"
    maxima = MAXIMA
    roots = ROOTS
    by_layer = MappingProxyType({"attention_entropy": ("mean", "min"), "max_logit": ("max",)})

    def __init__(
        self,
        every_n_steps: int = 25,
        heatmap_every_n_steps: int = 100,
        rows: int | str | None = 64,
        seed: int = 0,
        metrics: Sequence[str] | None = None,
    ) -> None:
        self.metrics = self._choose_metrics(metrics)
        super().__init__(every_n_steps, heatmap_every_n_steps)
        rows = None if rows == "all" else rows
        if rows is not None and (type(rows) is not int or rows < 1):
            raise ConfigError(
                f"{self.name}.rows",
                "must be a whole number, at least 1, or null for all",
                given=rows,
            )
        self.sampled_rows = rows
        self.seed = seed
        self._row_seed = seed
        self._rows: dict[tuple[int, torch.device], torch.Tensor] = {}

    def _choose_metrics(self, metrics: Sequence[str] | None) -> tuple[str, ...]:
        if metrics is None:
            return STATISTICS
        unknown = (
            [metrics] if isinstance(metrics, str) else [m for m in metrics if m not in STATISTICS]
        )
        if unknown or not metrics:
            raise ConfigError(
                f"{self.name}.metrics",
                "must be a list of metrics, or null for all",
                given=", ".join(map(str, unknown)) or "[]",
                valid=STATISTICS,
            )
        return tuple(name for name in STATISTICS if name in metrics)

    def start_step(self, trainer: pl.Trainer, batch: Mapping[str, Any], step: int) -> None:
        self._row_seed = self.seed * 1_000_003 + step
        self._rows.clear()

    def observe(self, call: AttentionCall) -> None:
        if runs_in_backward():  # the same rows once more, for gradient checkpointing
            return
        place = (call.query.shape[2], call.query.device)
        if place not in self._rows:
            generator = torch.Generator().manual_seed(self._row_seed)
            self._rows[place] = sample_rows(place[0], self.sampled_rows, generator).to(place[1])
        self._sums.add(call.site, compute_head_statistics(call, self._rows[place], self.metrics))
