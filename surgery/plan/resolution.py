"""What calibration decides for an operation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from surgery.transforms.edits import Parts

__all__ = ["Parts", "Resolution", "SiteResolution"]


@dataclass(frozen=True)
class SiteResolution:
    """What calibration decides for one site.

    Attributes:
        query, kv: per result head, the source heads that become it.
        tensors: role → tensor; see `surgery.transforms.head_edits.Rewrite`.
        figures: the numbers behind the decision, as JSON.
    """

    query: Parts
    kv: Parts
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)


# By site path.
Resolution = Mapping[str, SiteResolution]
