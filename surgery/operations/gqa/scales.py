"""QK-norm, taken for the linear map that it nearly is.

A head normalised by its root mean square turns little from token to token: khat = gain * u / rms(u)
is close to gain * scale_h * u. Shared keys are found for what the norm puts out and taken back
through it, where the norm itself restores the size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from surgery.models.sites import Norm, Site


@dataclass(frozen=True)
class Scales:
    """What a norm over a head does to its features, as factors.

    Attributes:
        gain: [D], what the norm multiplies each feature by.
        heads: [H], the factor that stands for dividing by the root mean square.
    """

    gain: torch.Tensor
    heads: torch.Tensor

    def fold_norm(self, dense: torch.Tensor, members: Sequence[int]) -> torch.Tensor:
        """Rewrite a map [D, members * D] of normalised features as one of the norm's input."""
        wide = dense.unflatten(1, (len(members), -1)) * self.gain
        wide = wide * self.heads[list(members)][None, :, None]
        back = wide.flatten(1) / self.gain[:, None]
        return back / self.heads[list(members)].mean()


def normalise_heads(model: nn.Module, norm: Norm | None, heads: torch.Tensor) -> torch.Tensor:
    """Apply the site's norm to [B, S, H, D]."""
    if norm is None:
        return heads
    module = model.get_submodule(norm.path)
    together = norm.size != heads.shape[-1]
    found: torch.Tensor = module(heads.flatten(-2) if together else heads)
    return found.view_as(heads)


def measure_scales(before: torch.Tensor, after: torch.Tensor) -> Scales:
    """Measure the scales of a norm by its input and output: [rows, H, D] each."""
    before, after = before.double(), after.double()
    unit = before / before.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
    gain = (after * unit).sum((0, 1)) / unit.pow(2).sum((0, 1)).clamp_min(1e-30)
    gain = torch.where(gain.abs() < 1e-6, torch.full_like(gain, 1e-6), gain)
    plain = after / gain
    heads = (plain * before).sum((0, 2)) / before.pow(2).sum((0, 2)).clamp_min(1e-30)
    return Scales(gain, heads)


def make_unit_scales(site: Site, role: str, like: torch.Tensor) -> Scales:
    """Make the scales of a site without a norm."""
    unit = site.get_projection(role).unit
    return Scales(like.new_ones(unit), like.new_ones(site.count_heads(role)))
