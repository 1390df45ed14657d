"""Conditions that no head should stay in, and which heads are in them at one observation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .head_monitor import Observation

# Kind of alarm → the metric it reads.
CONDITIONS = {
    "collapse": "normalized_entropy",
    "uniform": "normalized_entropy",
    "logits": "max_logit",
    "dead": "output_norm",
}

REMEMBERED = ("normalized_entropy", "output_norm")


@dataclass(frozen=True)
class Judged:
    """All heads at one observation, layer by layer: [sum of heads] each.

    Attributes:
        known: whether a head was observed at all.
    """

    value: torch.Tensor
    threshold: torch.Tensor
    bad: torch.Tensor
    known: torch.Tensor


def conditions(
    seen: Observation, thresholds: Mapping[str, float | None], highest: Mapping[str, torch.Tensor]
) -> dict[str, Judged]:
    """Kind → the heads, for each kind that has a threshold and was observed.

    Args:
        highest: of each metric in `REMEMBERED`, the largest of each head so far, this observation
            included: [sum of heads].
    """
    found = {}
    for kind, metric in CONDITIONS.items():
        limit, value = thresholds[kind], seen["metrics"].get(metric)
        if limit is None or value is None:
            continue
        threshold = torch.full_like(value, limit)
        if kind == "collapse":
            threshold *= highest[metric]
        if kind == "dead":
            threshold *= torch.fmax(highest[metric], _median_of_layer(value, seen["heads"]))
        bad = value >= threshold if kind in ("uniform", "logits") else value <= threshold
        found[kind] = Judged(value, threshold, bad, ~value.isnan())
    return found


def _median_of_layer(value: torch.Tensor, heads: list[int]) -> torch.Tensor:
    return torch.cat([layer.nanmedian().expand(len(layer)) for layer in value.split(heads)])
