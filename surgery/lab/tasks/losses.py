"""Held-out losses of several tasks with several models, masks or projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from surgery.config.schema import RunConfig
from surgery.data.module import TextData
from surgery.measure.loss import measure_held_out_loss
from surgery.models.forward import evaluating

# Model, mask or projections → task → nats per token.
Losses = Mapping[str, Mapping[str, float]]


def measure_task_losses(
    model: PreTrainedModel, data: Mapping[str, TextData], run: RunConfig, label: str
) -> dict[str, float]:
    """Measure the held-out loss of each task in nats per token, on the same windows each time."""
    with evaluating(model):
        return {
            name: measure_held_out_loss(
                model, one, run.measure, run.model.task, label=f"{name}, {label}"
            )
            for name, one in data.items()
        }


def find_harm(losses: Losses, without: str, limit: float) -> list[dict[str, Any]]:
    """Find masks that cost another task more than `limit` nats, compared with no mask.

    Args:
        without: the key of `losses` for no mask.
    """
    return [
        {"mask": mask, "task": task, "cost": loss - losses[without][task]}
        for mask, row in losses.items()
        for task, loss in row.items()
        if mask not in (without, task) and loss - losses[without][task] > limit
    ]
