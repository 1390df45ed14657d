"""The heads of a site's weights and features, whatever their layout."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from surgery.models.sites import Site
from surgery.transforms.head_edits import order


def features(site: Site, role: str, output: torch.Tensor) -> torch.Tensor:
    """A role's heads in what its projection put out: [B, S, out] to [B, S, heads, unit]."""
    projection = site.get_projection(role)
    units = output.unflatten(-1, (-1, projection.unit))
    return units[..., _units(site, role), :]


def weight_rows(model: nn.Module, site: Site, role: str) -> torch.Tensor:
    """[heads, unit, in] of query, key or value; in fp64 (fp32 on MPS)."""
    projection = site.get_projection(role)
    weight = model.get_parameter(f"{projection.path}.weight").detach()
    weight = widest(weight.mT if projection.transposed else weight)
    return weight.unflatten(0, (-1, projection.unit))[_units(site, role)]


def output_columns(model: nn.Module, site: Site) -> torch.Tensor:
    """[query heads, D_model, unit] of the output projection; in fp64 (fp32 on MPS)."""
    projection = site.output
    weight = model.get_parameter(f"{projection.path}.weight").detach()
    weight = widest(weight.mT if projection.transposed else weight)
    return weight.unflatten(1, (-1, projection.unit)).movedim(1, 0)


def in_plan_layout(site: Site, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A site's calibrated tensors in the layouts that a plan has for them."""
    turned = {
        role: t.mT if role == "output" and site.output.transposed else t
        for role, t in tensors.items()
    }
    return {role: tensor.contiguous() for role, tensor in turned.items()}


def put_parameter(block: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Set a parameter by its dotted name."""
    path, _, attribute = name.rpartition(".")
    setattr(block.get_submodule(path), attribute, parameter)


def widest(tensor: torch.Tensor) -> torch.Tensor:
    """In the widest dtype that its device has."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def _units(site: Site, role: str) -> list[int]:
    if site.packing is None:
        return list(range(site.count_heads(role)))
    places = order(site.packing, site.q_heads, site.kv_heads)
    where = {unit: place for place, unit in enumerate(places)}
    return [where[role, head] for head in range(site.count_heads(role))]
