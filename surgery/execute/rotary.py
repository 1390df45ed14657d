"""Positions of a live model: its rotary modules, built anew from its config.

They hold frequencies that no checkpoint stores, so editing the config of a live model changes
nothing by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from surgery.architecture.rotary import build, config_at, rotaries
from surgery.errors import PlanError
from surgery.execute.site_rope import has_site_rope
from surgery.execute.steps import step

# What stays of a module that is built anew in its place: hooks, and accelerate's.
_KEPT = ("training", "forward", "_old_forward", "_hf_hook", "_is_hf_initialized")


@step("rebuild_rotary")
def rebuild_rotary(
    model: PreTrainedModel,
    prefix: str = "",
    attributes: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Make the positions of `model` what its (already patched) config says, in fp32.

    Modules keep their identity, their hooks and their device; a model of lower precision does not
    round their frequencies.

    Args:
        prefix: which part of the config was patched ("" or "text_config.").
        attributes: module path → attribute → value, for what else the config decides when a model
            is built (the rotary width an attention block slices by).

    Raises:
        PlanError: the model has no such module, or layers whose positions were set by `site_rope`.
    """
    found = rotaries(model, config_at(model.config, prefix))
    if not found:
        raise PlanError(
            f"{type(model).__name__} has no rotary embedding that reads "
            f"{prefix}rope_parameters, so its positions cannot be changed"
        )
    own = [path for path, module in model.named_modules() if has_site_rope(module)]
    if own:
        raise PlanError(f"{', '.join(own)}: positions of their own, which this would not change")
    for path, module in found.items():
        try:
            fresh = build(module, module.config)
        except (KeyError, ValueError, TypeError, ArithmeticError, RuntimeError) as error:
            raise PlanError(f"{path} cannot be built from the config: {error}") from error
        _become(module, fresh.to(_device(module)))
    for path, values in (attributes or {}).items():
        for name, value in values.items():
            setattr(model.get_submodule(path), name, value)


def _device(module: nn.Module) -> torch.device:
    return next(module.buffers()).device


def _become(module: nn.Module, fresh: nn.Module) -> None:
    state = vars(module)
    kept = {name: value for name, value in state.items() if name in _KEPT or "_hooks" in name}
    state.clear()
    state.update(vars(fresh) | kept)
