"""Heads rewritten without changing the model, by hand: what calibration must see through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from surgery.models.sites import Site, find_sites
from surgery.transforms.head_edits import list_units

Groups = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Turning:
    """Which maps of a key head its positions allow.

    Attributes:
        layout: ``half`` (i, i + rotated/2), ``interleaved`` (2i, 2i + 1) or ``none``.
        rotated: how many features positions turn; the rest may be mapped as one likes.
        pure: whether planes may be rotated alone, not stretched (a norm follows).
    """

    layout: str = "none"
    rotated: int = 0
    pure: bool = False

    def draw(self, size: int, generator: torch.Generator) -> Tensor:
        """A random map [size, size], far from singular, that commutes with the positions."""
        made = torch.zeros(size, size, dtype=torch.float64)
        half = self.rotated // 2
        for plane in range(half):
            a, b = (plane, plane + half) if self.layout == "half" else (2 * plane, 2 * plane + 1)
            angle, stretch = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
            factor = torch.polar(
                torch.tensor(1.0 if self.pure else 0.5 + 1.5 * stretch, dtype=torch.float64),
                torch.tensor(6.28 * angle, dtype=torch.float64),
            )
            made[a, a] = made[b, b] = factor.real
            made[b, a], made[a, b] = factor.imag, -factor.imag
        rest = size - self.rotated
        made[self.rotated :, self.rotated :] = any_map(rest, generator)
        return made


def any_map(size: int, generator: torch.Generator) -> Tensor:
    """Invertible, with singular values between 0.6 and 1.6."""
    noise = torch.randn(2, size, size, generator=generator, dtype=torch.float64)
    left, right = torch.linalg.qr(noise).Q
    stretch = 0.6 + torch.rand(size, generator=generator, dtype=torch.float64)
    return left @ torch.diag(stretch) @ right


class Heads:
    """The rows (of the output projection: columns) of one site's heads, in place."""

    def __init__(self, model: PreTrainedModel, site: Site) -> None:
        self.model, self.site = model, site

    def tensors(self, role: str, head: int) -> list[Tensor]:
        """Views [unit, …] of the weight, and of the bias where there is one."""
        projection = self.site.get_projection(role)
        module = self.model.get_submodule(projection.path)
        weight = module.weight.mT if projection.transposed else module.weight
        place = slice(head * projection.unit, (head + 1) * projection.unit)
        if role == "output":
            return [weight[:, place].mT]
        if self.site.packing is not None:
            places = list_units(self.site.packing, self.site.q_heads, self.site.kv_heads)
            start = places.index((role, head)) * projection.unit
            place = slice(start, start + projection.unit)
        views = [weight[place]]
        if projection.bias:
            views.append(module.bias[place])
        return views

    def copy_(self, role: str, source: int, target: int) -> None:
        tensors = self.tensors(role, source), self.tensors(role, target)
        for old, new in zip(*tensors, strict=True):
            new.copy_(old.clone())

    def map_(self, role: str, head: int, matrix: Tensor) -> None:
        for tensor in self.tensors(role, head):
            tensor.copy_((matrix @ tensor.double()).to(tensor.dtype))


@torch.no_grad()
def rewrite_(
    model: PreTrainedModel,
    groups: Groups | Sequence[Groups],
    turning: Turning,
    *,
    seed: int = 0,
    sites: Sequence[Site] | None = None,
    stretch: bool = True,
) -> PreTrainedModel:
    """Give the KV heads of a group the same keys and values, written differently in each.

    Every head of a group becomes the group's first; then its keys and values are mapped, and the
    inverse is put into its query heads and their columns of the output projection.

    Args:
        groups: KV heads that come to be alike; or such a list per site.
        stretch: whether values are mapped by any map, or by orthogonal ones alone.
    """
    generator = torch.Generator().manual_seed(seed)
    sites = find_sites(model).sites if sites is None else sites
    per_site = groups if isinstance(groups[0][0], Sequence) else [groups] * len(sites)
    for site, alike in zip(sites, per_site, strict=True):
        heads = Heads(model, site)
        for group in alike:
            for head in group:
                for role in ("key", "value"):
                    heads.copy_(role, group[0], head)
        for head in (h for group in alike for h in group):
            rewrite_head_(heads, head, turning, generator, stretch=stretch)
    return model


def rewrite_head_(
    heads: Heads,
    head: int,
    turning: Turning,
    generator: torch.Generator,
    *,
    stretch: bool = True,
) -> None:
    """One KV head and all that read it; the model computes what it did before."""
    site = heads.site
    key = turning.draw(site.head_dim, generator)
    value = any_map(site.value_dim, generator)
    if not stretch:
        value = torch.linalg.qr(value).Q
    heads.map_("key", head, key)
    heads.map_("value", head, value)
    for reader in range(head * site.group_size, (head + 1) * site.group_size):
        heads.map_("query", reader, torch.linalg.inv(key).mT)
        heads.map_("output", reader, torch.linalg.inv(value).mT)
