"""What calibration decides for an operation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from surgery.transforms.edits import Parts

__all__ = ["Parts", "Resolution", "SiteResolution", "make_prefix", "name_tensors", "put_tensors"]


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


def make_prefix(number: int, path: str) -> str:
    """Make the start of the names, in a plan, of the tensors of one operation at one site."""
    return f"{number}.{path}"


def name_tensors(number: int, resolution: Resolution) -> dict[str, torch.Tensor]:
    """Give the tensors of an operation the names that they have in a plan."""
    return {
        f"{make_prefix(number, path)}.{role}": tensor
        for path, site in resolution.items()
        for role, tensor in site.tensors.items()
    }


def put_tensors(
    number: int, resolution: Resolution, tensors: Mapping[str, torch.Tensor]
) -> Resolution:
    """Replace an operation's tensors by others, which have the names of `name_tensors`."""
    return {
        path: replace(
            site,
            tensors={role: tensors[f"{make_prefix(number, path)}.{role}"] for role in site.tensors},
        )
        for path, site in resolution.items()
    }
