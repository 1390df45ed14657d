"""The importance of each head for the loss, from the backward pass of training."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import pytorch_lightning as pl
import torch
from torch.optim import Optimizer

from surgery.observe import AttentionCall

from .head_monitor import HeadMonitor


class HeadImportance(HeadMonitor):
    """Gate-gradient importance of each query head (Michel et al. 2019, arXiv:1905.10650, eq. 2).

    With a gate ξ_h = 1 on head h's output o_h (its slice of the output projection's input),
    ∂L/∂ξ_h = Σ o_h · ∂L/∂o_h. The importance is the mean of its absolute value over examples, in
    nats. An example is a row of a forward pass; a block that a pass calls several times has one
    gate. If the loss is a mean over tokens, a longer example weighs more. A layer that no gradient
    reaches (everything below it is frozen) has no value.

    The loss is the one that the optimizer steps on, whatever it is made of. It is a mean over its
    examples: over the rows of all forward passes whose gradient came back before the optimizer
    step. So gradients are multiplied by their number, and the importance is the sum over these rows
    of |∂L/∂ξ_h|: a mean of two passes over the same rows, or of two micro-batches, has the
    importance of one. With Lightning's own gradient accumulation every micro-batch has a loss of
    its own, and the examples of all weigh the same. The factors of gradient accumulation and of the
    loss scaler are undone.

    Args:
        every_n_steps, heatmap_every_n_steps: see `HeadMonitor`.
    """

    name = "head_importance"
    metrics = ("head_importance",)
    by_layer = MappingProxyType({"head_importance": ("mean", "min")})
    blind = "no gradient came back to it: is all of it frozen?"

    def __init__(self, every_n_steps: int = 25, heatmap_every_n_steps: int = 100) -> None:
        super().__init__(every_n_steps, heatmap_every_n_steps)
        # site → (forward pass, its rows) → gradients of the gates [B, Hq], since they were counted
        self._gates: dict[str, dict[tuple[int, int], torch.Tensor]] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._gates.clear()

    def observe(self, call: AttentionCall) -> None:
        output = call.output
        if not output.requires_grad:
            return
        # The hook must not hold `output` (or the call), to which it belongs: this cycle would keep
        # the graph of the whole step until garbage collection.
        site, value = call.site, output.detach()
        run = (0 if self._passes is None else self._passes.identify(), output.shape[0])

        def add_gate(gradient: torch.Tensor) -> None:
            gate = (value.float() * gradient.float()).sum((1, 3))
            gates = self._gates.setdefault(site, {})
            gates[run] = gates[run] + gate if run in gates else gate

        output.register_hook(add_gate)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self._count_gates(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        if pl_module.automatic_optimization:  # every micro-batch has a loss of its own
            self._count_gates(trainer)
        super().on_train_batch_end(trainer, pl_module, *args, **kwargs)

    @property
    def _is_complete(self) -> bool:
        return not self._gates

    def _count_gates(self, trainer: pl.Trainer) -> None:
        """Add what came back of one loss, which is a mean over all these rows."""
        scale = float(trainer.accumulate_grad_batches)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            scale /= float(scaler.get_scale())
        for site, gates in self._gates.items():
            slopes = torch.cat([gate.abs() for gate in gates.values()])
            examples = torch.tensor(float(len(slopes)), device=slopes.device)
            total = scale * examples * slopes.sum(0)
            self._sums.add(site, {"head_importance": (total, examples)})
        self._gates.clear()
