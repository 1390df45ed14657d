"""The heads of a site's weights and features, whatever their layout."""

from __future__ import annotations

import torch
from torch import nn

from surgery.anatomy import Site
from surgery.plan.head_edits import order


def features(site: Site, role: str, output: torch.Tensor) -> torch.Tensor:
    """A role's heads in what its projection put out: [B, S, out] to [B, S, heads, unit]."""
    projection = site.projection(role)
    units = output.unflatten(-1, (-1, projection.unit))
    return units[..., _units(site, role), :]


def weight_rows(model: nn.Module, site: Site, role: str) -> torch.Tensor:
    """[heads, unit, in] of query, key or value; in fp64 (fp32 on MPS)."""
    projection = site.projection(role)
    weight = model.get_parameter(f"{projection.path}.weight").detach()
    weight = widest(weight.mT if projection.transposed else weight)
    return weight.unflatten(0, (-1, projection.unit))[_units(site, role)]


def output_columns(model: nn.Module, site: Site) -> torch.Tensor:
    """[query heads, D_model, unit] of the output projection; in fp64 (fp32 on MPS)."""
    projection = site.output
    weight = model.get_parameter(f"{projection.path}.weight").detach()
    weight = widest(weight.mT if projection.transposed else weight)
    return weight.unflatten(1, (-1, projection.unit)).movedim(1, 0)


def widest(tensor: torch.Tensor) -> torch.Tensor:
    """In the widest dtype that its device has."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def _units(site: Site, role: str) -> list[int]:
    if site.packing is None:
        return list(range(site.heads(role)))
    places = order(site.packing, site.q_heads, site.kv_heads)
    where = {unit: place for place, unit in enumerate(places)}
    return [where[role, head] for head in range(site.heads(role))]
