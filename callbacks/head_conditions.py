"""Bad conditions of heads, and which heads are in them at one observation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .head_monitor import Observation

# Kind of alarm → the metric that it reads.
CONDITIONS = {
    "collapse": "normalized_entropy",
    "uniform": "normalized_entropy",
    "logits": "max_logit",
    "dead": "output_norm",
}

REMEMBERED = ("normalized_entropy", "output_norm")


@dataclass(frozen=True)
class HeadCondition:
    """One condition of all heads at one observation, layer by layer: [sum of heads] each.

    Attributes:
        value: the value of the metric.
        threshold: the limit for this value.
        bad: whether the value is past the limit.
        known: whether the head was observed.
    """

    value: torch.Tensor
    threshold: torch.Tensor
    bad: torch.Tensor
    known: torch.Tensor


def find_conditions(
    observation: Observation,
    thresholds: Mapping[str, float | None],
    highest: Mapping[str, torch.Tensor],
) -> dict[str, HeadCondition]:
    """Find the condition of all heads, for each kind that has a threshold and was observed.

    Args:
        highest: metric of `REMEMBERED` → the largest value of each head so far, this observation
            included: [sum of heads].
    """
    conditions = {}
    for kind, metric in CONDITIONS.items():
        limit, value = thresholds[kind], observation["metrics"].get(metric)
        if limit is None or value is None:
            continue
        threshold = torch.full_like(value, limit)
        if kind == "collapse":
            threshold *= highest[metric]
        if kind == "dead":
            medians = _compute_layer_medians(value, observation["heads"])
            threshold *= torch.fmax(highest[metric], medians)
        bad = value >= threshold if kind in ("uniform", "logits") else value <= threshold
        conditions[kind] = HeadCondition(value, threshold, bad, ~value.isnan())
    return conditions


def _compute_layer_medians(value: torch.Tensor, heads: list[int]) -> torch.Tensor:
    return torch.cat([layer.nanmedian().expand(len(layer)) for layer in value.split(heads)])
