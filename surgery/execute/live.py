"""Perform a plan on a model in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from surgery.errors import ConfigError, ConversionError, PlanError, get_first_line
from surgery.execute.config import patch_config_
from surgery.execute.undo import undoing_failure
from surgery.models.attributes import (
    Attributes,
    check_attributes,
    merge_attributes,
    set_attributes,
)
from surgery.models.config import check_patch, get_key
from surgery.models.convert import convert_model
from surgery.models.copies import is_on_meta, make_meta_copy
from surgery.models.editable import find_obstacle
from surgery.models.lists import can_grow, drop_parameters, grow_lists
from surgery.models.packed import forget_packing
from surgery.models.reference import ReferenceModels
from surgery.models.sites import Site, find_sites
from surgery.plan.draft import Step
from surgery.plan.plan import Plan
from surgery.plan.registry import check_arguments, check_step, get_operation, run_step
from surgery.record.write import forget_record, write_record
from surgery.transforms import TRANSFORMS, run_transform
from surgery.verify.conversion import check_conversion
from surgery.verify.equivalence import check_equivalence

# On a model: the plan that made it what it is.
_MARK = "_surgery_plan"
# What a transform raises for arguments that are not meant for it.
_FAULTS = (PlanError, LookupError, TypeError, ValueError, RuntimeError, ArithmeticError)


def apply_(
    model: PreTrainedModel,
    plan: Plan,
    *,
    check: bool = True,
    probe: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Perform `plan` on `model`, in place. Works on the meta device too.

    A model that already is the plan's result is left as it is, so calling twice is harmless.

    Args:
        model: the model the plan was made for, on one device.
        plan: what to do.
        check: check first that the result will compute what it should
            (`surgery.verify.equivalence`, and each operation's own check), which runs the model on
            a few tokens; never done on the meta device. Leave it out for weights that are not
            loaded yet.
        probe: arguments to run it with, for models that need more than token ids or pixels.

    Returns:
        `model`; or, where the plan converts it, the new model, which shares tensors with the old.

    Raises:
        PlanError: the model is not the one the plan was made for, its weights cannot be edited
            (`surgery.models.editable`), or a check failed. After any exception the model is what it
            was before.
    """
    mark = json.dumps(plan.to_json(), sort_keys=True)
    if getattr(model, _MARK, None) == mark or _is_result(model, plan):
        return model
    obstacle = find_obstacle(model)
    if obstacle is not None:
        raise PlanError(f"{obstacle.problem}: {obstacle.remedy}")
    if find_sites(model).sites != plan.source:
        raise PlanError(
            f"this {type(model).__name__} is not the model the plan was made for "
            f"({plan.model.get('class')}, {len(plan.source)} sites)"
        )
    if plan.open_decisions:
        raise PlanError(f"the plan is not calibrated yet: {plan.open_decisions[0]}")
    operations = {spec["operation"]: get_operation(spec["operation"]) for spec in plan.operations}
    checked = check and not is_on_meta(model)
    if plan.conversion is not None:
        old, model = model, _convert(model, plan.conversion)
        if checked:
            positions = plan.conversion.get("positions")
            check_conversion(old, model, positions_dropped=positions is not None)
        if find_sites(model).sites != plan.before:
            raise PlanError("the converted model is not what the plan predicted")
    references = ReferenceModels(model)
    _check_plan(model, plan, references)
    if checked:
        if plan.changes:
            check_equivalence(model, plan, probe)
        for operation in operations.values():
            operation.verify(model, plan, probe)
    if plan.loaded:
        _try_on_copy(model, plan, references)
    with undoing_failure(model):
        _operate(model, plan, references)
        setattr(model, _MARK, mark)
    return model


def _operate(model: PreTrainedModel, plan: Plan, references: ReferenceModels) -> None:
    attributes = _change(model, plan, references)
    forget_packing(model)
    if plan.export.format == "record":
        write_record(model, attributes, [step for step in plan.steps if step.recorded])
    else:
        forget_record(model)
    # Undone when the model is saved, so they are not in the record.
    apply_transient_(model, plan)


def _change(
    model: PreTrainedModel, plan: Plan, references: ReferenceModels
) -> dict[str, dict[str, Any]]:
    """Do all of a plan but its transient steps; return the attributes that were set."""
    _edit(model, plan)
    attributes = merge_attributes(plan.attributes, plan.head_attributes)
    set_attributes(model, attributes)
    patch_config_(model, {**plan.head_patch, **plan.config_patch}, references)
    _perform(model, [s for s in plan.steps if not get_operation(s.operation).transient])
    if find_sites(model).sites != _number_sites(plan.after):
        raise PlanError("the operated model is not what the plan predicted")
    return attributes


def _try_on_copy(model: PreTrainedModel, plan: Plan, references: ReferenceModels) -> None:
    """Do all of a plan on a copy without weights: its parts may contradict each other.

    Raises:
        PlanError: the result is not what the plan says, or a step cannot be done.
    """
    copied = make_meta_copy(model)
    tensors = {name: tensor.to("meta") for name, tensor in plan.tensors.items()}
    hollow = replace(plan, tensors=tensors)
    try:
        _change(copied, hollow, references)
        apply_transient_(copied, hollow)
    except (AttributeError, *_FAULTS) as error:
        raise PlanError(f"the plan cannot be done: {get_first_line(error)}") from error


def _convert(model: PreTrainedModel, conversion: Mapping[str, Any]) -> PreTrainedModel:
    try:
        check_arguments(convert_model, conversion)
        return convert_model(model, **conversion)
    except (ConversionError, *_FAULTS) as error:
        raise PlanError(f"the plan's conversion {dict(conversion)} fails: {error}") from error


def apply_transient_(model: PreTrainedModel, plan: Plan) -> None:
    """Do what a plan does only for the run, on a model on which the rest of it is done."""
    _perform(model, [s for s in plan.steps if get_operation(s.operation).transient])


def _is_result(model: PreTrainedModel, plan: Plan) -> bool:
    """Whether the model is what the plan changes its source to, though nothing marks it so."""
    if not isinstance(model, PreTrainedModel):
        return False
    sites = find_sites(model).sites
    done = sites != plan.source and sites == _number_sites(plan.after)
    return done and _holds_patch(model, plan)


def _holds_patch(model: PreTrainedModel, plan: Plan) -> bool:
    """Whether the config says what the plan's result says; nested values may say more."""
    for key, value in {**plan.head_patch, **plan.config_patch}.items():
        held = get_key(model.config, key)
        if isinstance(value, Mapping) and isinstance(held, Mapping):
            held = {name: held.get(name) for name in value}
        if held != value:
            return False
    return True


def _perform(model: PreTrainedModel, steps: Sequence[Step]) -> None:
    for step in steps:
        run_step(step.kind, model, step.arguments)


def _edit(model: PreTrainedModel, plan: Plan) -> None:
    # Layers that share a tensor go on sharing it.
    done: dict[tuple[tuple[int, ...], str], list[nn.Parameter]] = {}
    kept: list[nn.Parameter] = []  # so that no new tensor takes the identity of an old one
    for edit in plan.edits:
        sources = [model.get_parameter(spec.name) for spec in edit.sources]
        given = [spec.name for spec in edit.resolved]
        key = (tuple(map(id, sources)), json.dumps([edit.transform, edit.arguments, given]))
        kept += sources
        if key not in done:
            tensors = [*(s.detach() for s in sources), *plan.get_inputs(edit)]
            results = run_transform(edit.transform, tensors, edit.arguments)
            done[key] = [nn.Parameter(r, requires_grad=sources[0].requires_grad) for r in results]
        grow_lists(model, (spec.name for spec in edit.results))
        drop_parameters(model, edit.dropped)
        for spec, parameter in zip(edit.results, done[key], strict=True):
            path, _, attribute = spec.name.rpartition(".")
            setattr(model.get_submodule(path), attribute, parameter)


def _check_plan(model: PreTrainedModel, plan: Plan, references: ReferenceModels) -> None:
    """Check all of a plan on the model, so that a broken or hostile plan does not damage it."""
    _check_edits(model, plan)
    patch = {**plan.head_patch, **plan.config_patch}
    check_patch(model.config, patch)
    derived: Attributes = {}
    if patch:
        try:
            references.get(patch)
            derived = references.find_attributes(plan.config_patch)
        except ConfigError as error:
            raise PlanError(error.problem) from error
    check_attributes(model, plan.attributes, derived)
    check_attributes(model, plan.head_attributes)
    for step in plan.steps:
        check_step(step.kind, step.arguments)


def _check_edits(model: PreTrainedModel, plan: Plan) -> None:
    """Run every transform on the meta device, with the shapes of the model's own tensors."""
    held = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}
    for edit in plan.edits:
        for spec in edit.sources:
            if held.get(spec.name) != spec.shape:
                raise PlanError(f"{spec.name} is {held.get(spec.name)}, the plan says {spec.shape}")
        most = len(edit.sources) + len(edit.results)
        for spec in edit.results:
            if spec.name not in held and not can_grow(model, spec.name, most):
                raise PlanError(f"the model has no {spec.name} for {edit.transform} to change")
        given = (*edit.sources, *edit.resolved)
        for spec, tensor in zip(edit.resolved, plan.get_inputs(edit), strict=True):
            if tuple(tensor.shape) != spec.shape:
                raise PlanError(f"{spec.name} is {tuple(tensor.shape)}, the plan says {spec.shape}")
        sources = [torch.empty(spec.shape, device="meta") for spec in given]
        names = ", ".join(spec.name for spec in edit.results)
        try:
            check_arguments(TRANSFORMS[edit.transform], edit.arguments)
            results = run_transform(edit.transform, sources, edit.arguments)
        except _FAULTS as error:
            raise PlanError(f"{names}: {edit.transform} cannot be done: {error}") from None
        shapes = [tuple(result.shape) for result in results]
        if shapes != [spec.shape for spec in edit.results]:
            raise PlanError(f"{names}: {edit.transform} gives {shapes}, not what the plan says")
        for name in edit.dropped:
            held.pop(name, None)  # a plan from a file may name a source twice
        held |= {spec.name: spec.shape for spec in edit.results}


def _number_sites(sites: Sequence[Site]) -> tuple[Site, ...]:
    """Number the sites from 0, as `find_sites` would in the result."""
    return tuple(replace(site, layer=layer) for layer, site in enumerate(sites))
