"""How much the loss hangs on each head, from the training backward pass itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch

from surgery.observation import AttentionCall

from .head_monitor import HeadMonitor


class HeadImportance(HeadMonitor):
    """Gate-gradient importance of each query head (Michel et al. 2019, arXiv:1905.10650, eq. 2).

    With a gate ξ_h = 1 on head h's output o_h (its slice of the output projection's input),
    ∂L/∂ξ_h = Σ o_h · ∂L/∂o_h; the importance is the mean over examples of its absolute value, in
    nats. The loss of a batch is the mean over its examples, so each example's share is scaled
    back by their number, and by gradient accumulation and loss scaling where they are on.

    Args:
        every_n_steps, heatmap_every_n_steps: see `HeadMonitor`.
    """

    name = "head_importance"
    metrics = ("head_importance",)

    def __init__(self, every_n_steps: int = 25, heatmap_every_n_steps: int = 100) -> None:
        super().__init__(every_n_steps, heatmap_every_n_steps)
        self._scale = 1.0

    def start_step(self, trainer: pl.Trainer, batch: Mapping[str, Any], step: int) -> None:
        self._scale = float(trainer.accumulate_grad_batches)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            self._scale /= float(scaler.get_scale())

    def observe(self, call: AttentionCall) -> None:
        output = call.output
        if not output.requires_grad:
            return
        scale = self._scale * output.shape[0]

        def take(gradient: torch.Tensor) -> None:
            gate = (output.detach() * gradient).sum((1, 3), dtype=torch.float32)
            examples = torch.tensor(float(gate.shape[0]), device=gate.device)
            self._sums.add(
                call.site, {"head_importance": (scale * gate.abs().sum(0), examples)}
            )

        output.register_hook(take)
