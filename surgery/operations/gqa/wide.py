"""A merge in the shapes of its source: what calibration runs, and what later layers see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from surgery.calibration.rows import put_parameter, to_plan_layout
from surgery.calibration.view import capturing_output
from surgery.models.sites import Site
from surgery.operations.gqa.solve import SiteMerge
from surgery.plan.resolution import Parts
from surgery.transforms.edits import SiteChange, TensorEdit
from surgery.transforms.head_edits import Merging, Rewrite, make_rewrite_specs, regroup
from surgery.verify.equivalence import Tensors, make_site_tensors

_REWRITE = "calibrating"


def make_wide_tensors(model: PreTrainedModel, site: Site, merge: SiteMerge) -> Tensors:
    """Make the block's tensors with `merge` done and its heads spread out again; local names.

    Differentiable in the merge's tensors.
    """
    rewrite = Rewrite(_REWRITE, "output_bias" in merge.tensors)
    given = to_plan_layout(site, merge.tensors)
    specs = make_rewrite_specs(site, rewrite, merge.query, merge.kv)
    named = {spec.name: given[role] for role, spec in specs.items()}

    def get_inputs(edit: TensorEdit) -> list[torch.Tensor]:
        return [named[spec.name] for spec in edit.resolved]

    return _make_tensors(
        model,
        site,
        regroup(site, "calibration", merge.query, merge.kv, Merging(), rewrite),
        get_inputs,
    )[1]


def make_moved_tensors(model: PreTrainedModel, site: Site, query: Parts, kv: Parts) -> Tensors:
    """Make the block's tensors with its heads in another order, as many as before."""
    return _make_tensors(model, site, regroup(site, "calibration", query, kv, Merging()))[0]


def _make_tensors(
    model: PreTrainedModel,
    site: Site,
    change: SiteChange,
    inputs: Callable[[TensorEdit], list[torch.Tensor]] = lambda _: [],
) -> tuple[Tensors, Tensors]:
    """Make the block's tensors after a change, and the same spread out; local names."""
    block = model.get_submodule(site.block)
    new, wide = make_site_tensors(block, site, change.edits, inputs)
    prefix = f"{site.block}." if site.block else ""
    names = {spec.name[len(prefix) :] for edit in change.edits for spec in edit.results}
    return {name: new[name] for name in names}, {name: wide[name] for name in names}


def set_wide(model: PreTrainedModel, site: Site, merge: SiteMerge) -> dict[str, nn.Parameter]:
    """Let `model`, its own tensors only, compute the result of `merge`; return the old ones."""
    return _set_tensors(model, site, make_wide_tensors(model, site, merge))


def set_plain(
    model: PreTrainedModel, site: Site, query: Parts, kv: Parts, merging: Merging
) -> dict[str, nn.Parameter]:
    """Do the same for a merge without coefficients."""
    return _set_tensors(
        model, site, _make_tensors(model, site, regroup(site, "calibration", query, kv, merging))[1]
    )


def _set_tensors(model: PreTrainedModel, site: Site, made: Tensors) -> dict[str, nn.Parameter]:
    block = model.get_submodule(site.block)
    before = {name: block.get_parameter(name) for name in made}
    for name, tensor in made.items():
        put_parameter(block, name, nn.Parameter(tensor.detach(), requires_grad=False))
    return before


def compute_output(
    model: PreTrainedModel, site: Site, tensors: Tensors, args: Any, kwargs: Any
) -> torch.Tensor:
    """Compute the output of the site's output projection with other tensors in its block."""
    block = model.get_submodule(site.block)
    path = site.output.path[len(site.block) :].lstrip(".")
    with capturing_output(block, path) as found:
        functional_call(block, tensors, args, kwargs)
    return found[-1]
