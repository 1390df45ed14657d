"""The live executor: a plan performed on a model in memory."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from surgery.anatomy import find_sites
from surgery.errors import PlanError
from surgery.execute.attributes import set_attributes
from surgery.execute.rehearse import rehearse
from surgery.execute.transforms import run_transform
from surgery.plan.config_patch import apply_patch
from surgery.plan.plan import Plan


def apply_(model: PreTrainedModel, plan: Plan, *, check: bool = True) -> PreTrainedModel:
    """Perform `plan` on `model`, in place. Works on the meta device too.

    A model that already is the plan's result is left as it is, so calling twice is harmless.

    Args:
        model: the model the plan was made for, on one device.
        plan: what to do.
        check: rehearse first (`surgery.execute.rehearse`), which runs the model once on a few
            tokens; never done on the meta device. Leave it out for weights that mean nothing yet.

    Raises:
        PlanError: the model is not the one the plan was made for, or the rehearsal failed. The
            model is untouched then.
    """
    sites = find_sites(model).sites
    if sites != plan.before:
        if plan.changes and sites == plan.after:
            return model
        raise PlanError(
            f"this {type(model).__name__} is not the model the plan was made for "
            f"({plan.model.get('class')}, {len(plan.before)} sites)"
        )
    _check_edits(plan)
    if check and plan.changes and not _on_meta(model):
        rehearse(model, plan)
    for edit in plan.edits:
        tensors = [model.get_parameter(spec.name).detach() for spec in edit.sources]
        results = run_transform(edit.transform, tensors, edit.arguments)
        for spec, tensor in zip(edit.results, results, strict=True):
            _set(model, spec.name, tensor)
    set_attributes(model, plan.attributes)
    apply_patch(model.config, plan.config_patch)
    if find_sites(model).sites != plan.after:
        raise PlanError("the operated model is not what the plan predicted")
    return model


def _check_edits(plan: Plan) -> None:
    """Run every transform on shapes alone, so that a broken plan breaks no model."""
    for edit in plan.edits:
        sources = [torch.empty(spec.shape, device="meta") for spec in edit.sources]
        names = ", ".join(spec.name for spec in edit.results)
        try:
            results = run_transform(edit.transform, sources, edit.arguments)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise PlanError(f"{names}: {edit.transform} cannot be done: {error}") from None
        shapes = [tuple(result.shape) for result in results]
        if shapes != [spec.shape for spec in edit.results]:
            raise PlanError(f"{names}: {edit.transform} gives {shapes}, not what the plan says")


def _on_meta(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def _set(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, attribute)
    setattr(module, attribute, nn.Parameter(tensor, requires_grad=old.requires_grad))
