"""Gradient steps on calibrated tensors, as large as the tensors ask for."""

from __future__ import annotations

from collections.abc import Mapping

import torch


class Descent:
    """Adam on copies of tensors. Steps are relative to a tensor's size, and go down to 0 in time.

    Attributes:
        tensors: name → the copy, which is trained.

    Args:
        given: name → tensor; fp32 is enough for what is trained.
        rate: first step size, relative to the root mean square of a tensor.
        steps: how many there will be.
        warmup: over so many steps the rate rises first.
    """

    def __init__(
        self, given: Mapping[str, torch.Tensor], rate: float, steps: int, warmup: int = 1
    ) -> None:
        self.tensors = {
            name: tensor.detach().float().clone().requires_grad_() for name, tensor in given.items()
        }
        self._steps, self._warmup, self._done = steps, warmup, 0
        self._first = [
            rate * float(tensor.detach().square().mean().sqrt()) for tensor in self.tensors.values()
        ]
        groups = [{"params": [tensor]} for tensor in self.tensors.values()]
        self._optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))

    def take_step(self, loss: torch.Tensor) -> None:
        """Take the next step down a loss that was computed from the tensors."""
        share = min(1.0, (self._done + 1) / self._warmup) * (1 - self._done / self._steps)
        # Of these alone: the model's own parameters may want gradients too.
        gradients = torch.autograd.grad(loss, list(self.tensors.values()))
        groups = self._optimizer.param_groups
        for group, first, gradient in zip(groups, self._first, gradients, strict=True):
            group["lr"] = first * share
            group["params"][0].grad = gradient
        self._optimizer.step()
        self._done += 1

    def copy_tensors(self) -> dict[str, torch.Tensor]:
        """Copy the tensors as they are now."""
        return {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
