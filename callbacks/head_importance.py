"""The importance of each head for the loss, from the backward pass of training."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytorch_lightning as pl
import torch

from surgery.observe import AttentionCall

from .head_monitor import HeadMonitor


class HeadImportance(HeadMonitor):
    """Gate-gradient importance of each query head (Michel et al. 2019, arXiv:1905.10650, eq. 2).

    With a gate ξ_h = 1 on head h's output o_h (its slice of the output projection's input),
    ∂L/∂ξ_h = Σ o_h · ∂L/∂o_h. The importance is the mean of its absolute value over examples, in
    nats. An example is a row of the batch. The loss of a batch is a mean, so gradients are
    multiplied by the number of examples, and scaling by gradient accumulation and by the loss
    scaler is undone. If the mean is over tokens, a longer example weighs more. A layer that no
    gradient reaches (everything below it is frozen) has no value.

    Args:
        every_n_steps, heatmap_every_n_steps: see `HeadMonitor`.
    """

    name = "head_importance"
    metrics = ("head_importance",)
    by_layer = MappingProxyType({"head_importance": ("mean", "min")})
    blind = "no gradient came back to it: is all of it frozen?"

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
        # The hook must not hold `output` (or the call), to which it belongs: this cycle would keep
        # the graph of the whole step until garbage collection.
        site, value = call.site, output.detach()

        def add_importance(gradient: torch.Tensor) -> None:
            gate = (value.float() * gradient.float()).sum((1, 3))
            examples = torch.tensor(float(gate.shape[0]), device=gate.device)
            self._sums.add(site, {"head_importance": (scale * gate.abs().sum(0), examples)})

        output.register_hook(add_importance)
