"""The live executor: a plan performed on a model in memory."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from surgery.anatomy import Site, find_sites
from surgery.errors import PlanError
from surgery.execute.transforms import run_transform
from surgery.plan.config_patch import apply_patch
from surgery.plan.plan import Plan


def apply_(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """Perform `plan` on `model`, in place. Works on the meta device too.

    A model that already is the plan's result is left as it is, so calling twice is harmless.

    Raises:
        PlanError: the model is not the one the plan was made for.
    """
    sites = find_sites(model).sites
    if sites != plan.before:
        if plan.changes and sites == plan.after:
            return model
        raise PlanError(
            f"this {type(model).__name__} is not the model the plan was made for "
            f"({plan.model.get('class')}, {len(plan.before)} sites)"
        )
    for change in plan.changes:
        for edit in change.edits:
            tensors = [_get(model, spec.name) for spec in edit.sources]
            results = run_transform(edit.transform, tensors, dict(edit.arguments))
            for spec, tensor in zip(edit.results, results, strict=True):
                if tuple(tensor.shape) != spec.shape:
                    raise PlanError(
                        f"{spec.name}: {tuple(tensor.shape)}, but the plan says {spec.shape}"
                    )
                _set(model, spec.name, tensor)
        _set_head_counts(model, change.after)
    apply_patch(model.config, plan.config_patch)
    if find_sites(model).sites != plan.after:
        raise PlanError("the operated model is not what the plan predicted")
    return model


def _get(model: nn.Module, name: str) -> torch.Tensor:
    return model.get_parameter(name).detach()


def _set(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Replace a parameter and tell its module the new sizes."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, attribute)
    setattr(module, attribute, nn.Parameter(tensor, requires_grad=old.requires_grad))
    if isinstance(module, nn.Linear) and attribute == "weight":
        module.out_features, module.in_features = tensor.shape
    elif hasattr(module, "normalized_shape"):
        module.normalized_shape = tuple(tensor.shape)


def _set_head_counts(model: nn.Module, site: Site) -> None:
    module = model.get_submodule(site.path)
    counts = {
        "num_key_value_heads": site.kv_heads,
        "num_kv_heads": site.kv_heads,
        "num_key_value_groups": site.group_size,
    }
    for attribute, value in counts.items():
        if hasattr(module, attribute):
            setattr(module, attribute, value)
