"""Held-out losses of several tasks under several models, masks or projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from surgery.config.schema import RunConfig
from surgery.data.module import TextData
from surgery.measure.loss import measure_held_out_loss

# What it is under → task → nats per token.
Losses = Mapping[str, Mapping[str, float]]


def task_losses(
    model: PreTrainedModel, data: Mapping[str, TextData], run: RunConfig, label: str
) -> dict[str, float]:
    """Held-out loss of each task, nats per token, on the same windows at every call."""
    training = model.training
    model.eval()
    losses = {
        name: measure_held_out_loss(
            model, one, run.measure, run.model.task, label=f"{name}, {label}"
        )
        for name, one in data.items()
    }
    model.train(training)
    return losses


def harm(losses: Losses, without: str, limit: float) -> list[dict[str, Any]]:
    """Masks that cost a task other than their own more than `limit` nats over no mask.

    Args:
        without: the key of `losses` under which no mask is.
    """
    return [
        {"mask": mask, "task": task, "cost": loss - losses[without][task]}
        for mask, row in losses.items()
        for task, loss in row.items()
        if mask not in (without, task) and loss - losses[without][task] > limit
    ]
