"""Get the heads of a site's weights and features in any layout."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from surgery.models.sites import Site
from surgery.transforms.head_edits import list_units


def get_head_features(site: Site, role: str, output: torch.Tensor) -> torch.Tensor:
    """Get a role's heads from the output of its projection: [B, S, out] → [B, S, heads, unit]."""
    projection = site.get_projection(role)
    units = output.unflatten(-1, (-1, projection.unit))
    return units[..., _find_units(site, role), :]


def get_weight_rows(model: nn.Module, site: Site, role: str) -> torch.Tensor:
    """Get the weight of query, key or value as [heads, unit, in], in fp64 (fp32 on MPS)."""
    projection = site.get_projection(role)
    weight = model.get_parameter(f"{projection.path}.weight").detach()
    weight = widen(weight.mT if projection.transposed else weight)
    return weight.unflatten(0, (-1, projection.unit))[_find_units(site, role)]


def get_output_columns(model: nn.Module, site: Site) -> torch.Tensor:
    """Get the output weight as [query heads, D_model, unit], in fp64 (fp32 on MPS)."""
    projection = site.output
    weight = model.get_parameter(f"{projection.path}.weight").detach()
    weight = widen(weight.mT if projection.transposed else weight)
    return weight.unflatten(1, (-1, projection.unit)).movedim(1, 0)


def to_plan_layout(site: Site, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert a site's calibrated tensors to the layouts of the plan."""
    transposed = {
        role: t.mT if role == "output" and site.output.transposed else t
        for role, t in tensors.items()
    }
    return {role: tensor.contiguous() for role, tensor in transposed.items()}


def put_parameter(block: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Set a parameter by its dotted name."""
    path, _, attribute = name.rpartition(".")
    setattr(block.get_submodule(path), attribute, parameter)


def widen(tensor: torch.Tensor) -> torch.Tensor:
    """Convert a tensor to the widest dtype that its device has."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def _find_units(site: Site, role: str) -> list[int]:
    if site.packing is None:
        return list(range(site.count_heads(role)))
    places = list_units(site.packing, site.q_heads, site.kv_heads)
    where = {unit: place for place, unit in enumerate(places)}
    return [where[role, head] for head in range(site.count_heads(role))]
