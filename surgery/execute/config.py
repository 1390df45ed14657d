"""Patch the config of a live model, and rebuild the modules that depend on it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from surgery.errors import ConfigError, PlanError
from surgery.models.config import apply_patch, get_config_part, list_config_prefixes
from surgery.models.length import state_length_
from surgery.models.reference import ReferenceModels, find_differing_attributes
from surgery.models.rotary import build_rotary, find_rotaries

# What a rebuilt module keeps: its hooks, and accelerate's.
_KEPT = ("training", "forward", "_old_forward", "_hf_hook", "_is_hf_initialized")


def patch_config_(
    model: PreTrainedModel, patch: Mapping[str, Any], references: ReferenceModels | None = None
) -> None:
    """Set dotted config keys, and rebuild what holds numbers that follow from them.

    The plan holds the attributes (`surgery.models.reference`). This function rebuilds rotary
    embeddings, whose frequencies no checkpoint stores, and modules without parameters that have
    another class under the patched config. Rebuilt modules keep their identity, their hooks and
    their device; frequencies are in fp32 whatever the model's dtype.

    Args:
        references: of the model before the patch, where there are some already.

    Raises:
        PlanError: a module cannot be built from the patched config.
    """
    if not patch:
        return
    references = references or ReferenceModels(model)
    before = copy.deepcopy(model.config)
    try:
        old_reference, new_reference = references.get({}), references.get(patch)
    except ConfigError as error:
        raise PlanError(error.problem) from error
    apply_patch(model.config, patch)
    state_length_(model, before)
    places = {id(get_config_part(model.config, p)): p for p in list_config_prefixes(model.config)}
    for path, module in find_rotaries(model).items():
        prefix = places.get(id(module.config))
        if prefix is None:  # it has its own config, which no key reaches
            continue
        try:
            old, new = (
                build_rotary(module, get_config_part(before, prefix)),
                build_rotary(module, module.config),
            )
        except (KeyError, ValueError, TypeError, ArithmeticError, RuntimeError) as error:
            raise PlanError(f"{path} cannot be built from the config: {error}") from error
        if _differ(old, new):
            _replace_state(module, new.to(next(module.buffers()).device))
    for path, fresh in _find_other_kinds(old_reference, new_reference):
        _replace(model, path, fresh)


def _differ(old: nn.Module, new: nn.Module) -> bool:
    buffers = dict(old.named_buffers()), dict(new.named_buffers())
    if buffers[0].keys() != buffers[1].keys():
        return True
    if any(not torch.equal(tensor, buffers[1][name]) for name, tensor in buffers[0].items()):
        return True
    return bool(find_differing_attributes(old, new))


def _replace_state(module: nn.Module, fresh: nn.Module) -> None:
    state = vars(module)
    kept = {name: value for name, value in state.items() if name in _KEPT or "_hooks" in name}
    state.clear()
    state.update(vars(fresh) | kept)


def _find_other_kinds(old: nn.Module, new: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Find modules without tensors that have different classes in two reference models."""
    old_modules = dict(old.named_modules())
    for path, module in new.named_modules():
        other = old_modules.get(path)
        if not path or other is None or type(other) is type(module):
            continue
        if not module.state_dict() and not any(True for _ in module.buffers()):
            yield path, module


def _replace(model: nn.Module, path: str, fresh: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    holder = model.get_submodule(parent)
    # A copy, since reference models are kept, and a plan may be tried on another model first.
    setattr(holder, name, copy.deepcopy(fresh).train(holder.training))
