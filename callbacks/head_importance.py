"""How much the loss hangs on each head, from the training backward pass itself."""

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
    ∂L/∂ξ_h = Σ o_h · ∂L/∂o_h; the importance is the mean over examples of its absolute value, in
    nats. An example is a row of the batch. The loss of a batch is a mean, so each example's share
    of it is scaled back by their number, and by gradient accumulation and loss scaling where they
    are on; where the mean is over tokens, a longer example weighs more. Gradients that never
    reach a layer (all below it is frozen) leave it without a figure.

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
        # The hook lives on `output`: were it to hold `output` (or the call) too, the graph of the
        # whole step would wait for the garbage collector.
        site, value = call.site, output.detach()

        def take(gradient: torch.Tensor) -> None:
            gate = (value.float() * gradient.float()).sum((1, 3))
            examples = torch.tensor(float(gate.shape[0]), device=gate.device)
            self._sums.add(site, {"head_importance": (scale * gate.abs().sum(0), examples)})

        output.register_hook(take)
