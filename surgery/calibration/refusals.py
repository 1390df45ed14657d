"""Refuse sites that cannot be calibrated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from surgery.errors import SiteError
from surgery.models.packed import make_inputs
from surgery.models.sites import ROLES, Site


def refuse_shared(model: PreTrainedModel, sites: Sequence[Site]) -> None:
    """Check that sites share no tensors, since they are solved one after the other.

    Raises:
        SiteError: two sites share a tensor.
    """
    owner: dict[int, Site] = {}
    for site in sites:
        for role in (*ROLES, "output"):
            weight = model.get_parameter(f"{site.get_projection(role).path}.weight")
            other = owner.setdefault(id(weight), site)
            if other is not site:
                raise SiteError(site.path, f"it shares its weights with {other.path}")


@torch.no_grad()
def refuse_repeated(
    model: PreTrainedModel, sites: Sequence[Site], batch: Mapping[str, torch.Tensor]
) -> None:
    """Check that a pass calls every site only once, since only the first call is observed.

    Raises:
        SiteError: a pass calls a block several times, as if all layers are the same module.
    """
    calls = dict.fromkeys((site.path for site in sites), 0)

    def count_call(path: str, *_: object) -> None:
        calls[path] += 1

    handles = []
    device = next(model.parameters()).device
    moved = {name: value.to(device) for name, value in batch.items() if name != "labels"}
    inputs = make_inputs(model, moved)
    try:
        for site in sites:
            block: nn.Module = model.get_submodule(site.block)
            handles.append(block.register_forward_hook(partial(count_call, site.path)))
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    for site in sites:
        if calls[site.path] > 1:
            raise SiteError(site.path, f"one pass over the data calls it {calls[site.path]} times")
