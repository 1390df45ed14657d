"""Positions of single attention blocks, where the model's config has one entry for all of them.

A hook hands a block other rotations than the model computed. The block itself is not changed, so
caches, masks and kernels work as before; keys are cached rotated by what the block was given.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from surgery.errors import PlanError
from surgery.models.rotary import (
    build_rotary,
    compute_rotation,
    find_layer_type,
    find_rotary,
    replace_parameters,
)
from surgery.operations.rope.frequencies import FAULTS, format_error

EMBEDDINGS = "position_embeddings"
IDS = "position_ids"


class SiteRope:
    """Forward pre-hook of an attention block.

    Args:
        path: of the block, for messages.
        forward: the block's parameter names, in order.
        rotary: computes the rotations, always in fp32; ``None`` for no rotation at all (NoPE).
        layer_type: the type given to `rotary`, where it serves several.
    """

    def __init__(
        self, path: str, forward: list[str], rotary: nn.Module | None, layer_type: str | None
    ) -> None:
        self.path = path
        self.forward = forward
        self.rotary = rotary
        self.layer_type = layer_type

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = self._get_argument(EMBEDDINGS, args, kwargs)
        if given is None:
            raise PlanError(f"{self.path} was given no {EMBEDDINGS} to replace")
        if self.rotary is None:
            new = _make_identity(given)
        else:
            new = self._compute_rotations(given, args, kwargs)
        if EMBEDDINGS in kwargs:
            return args, kwargs | {EMBEDDINGS: new}
        index = self.forward.index(EMBEDDINGS)
        return (*args[:index], new, *args[index + 1 :]), kwargs

    def _get_argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in kwargs or name not in self.forward:
            return kwargs.get(name)
        index = self.forward.index(name)
        return args[index] if index < len(args) else None

    def _compute_rotations(self, given: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ids = self._get_argument(IDS, args, kwargs)
        if ids is None:
            raise PlanError(f"no {IDS} reach {self.path}, so it cannot compute rotations")
        like = _get_first(given)
        assert self.rotary is not None
        if not like.is_meta:
            self.rotary.to(like.device)
        new = compute_rotation(self.rotary, like, ids, self.layer_type)
        if _get_first(new).shape != like.shape:
            raise PlanError(
                f"{self.path}: rotations of shape {tuple(_get_first(new).shape)} where the model "
                f"has {tuple(like.shape)}"
            )
        return new


def set_site_rope_(model: PreTrainedModel, sites: Mapping[str, Mapping[str, Any] | None]) -> None:
    """Give attention blocks positions of their own, replacing those they may have.

    Args:
        sites: module path → `rope_parameters`, flat; ``None`` for no positions (NoPE).

    Raises:
        PlanError: a block takes no rotations from outside, or the model does not say which module
            computes them.
    """
    built = {path: _make_hook(model, path, parameters) for path, parameters in sites.items()}
    for path, hook in built.items():
        unset_site_rope_(model, path)
        model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)


def unset_site_rope_(model: nn.Module, path: str | None = None) -> None:
    """Let a block (or all of them) use the model's own positions again."""
    modules = model.modules() if path is None else [model.get_submodule(path)]
    for module in modules:
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, SiteRope):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def has_site_rope(module: nn.Module) -> bool:
    return any(isinstance(hook, SiteRope) for hook in module._forward_pre_hooks.values())


def _make_hook(model: PreTrainedModel, path: str, parameters: Mapping[str, Any] | None) -> SiteRope:
    try:
        block = model.get_submodule(path)
    except AttributeError:
        raise PlanError(f"the model has no {path}") from None
    forward = list(inspect.signature(type(block).forward).parameters)[1:]
    if EMBEDDINGS not in forward:
        raise PlanError(f"{path} takes no {EMBEDDINGS}, so its positions cannot be changed")
    if parameters is None:
        return SiteRope(path, forward, None, None)
    rotary = find_rotary(model, path)
    if rotary is None:
        raise PlanError(f"it is not clear what computes the rotations of {path}")
    try:
        layer_type = find_layer_type(rotary.config, block)
        own = build_rotary(rotary, replace_parameters(rotary.config, layer_type, parameters))
    except FAULTS as error:
        raise PlanError(f"{path}: {format_error(error)}") from error
    return SiteRope(path, forward, own, layer_type)


def _make_identity(given: Any) -> Any:
    """Make rotations by nothing: cos 1 and sin 0, or complex ones."""
    if isinstance(given, torch.Tensor):
        if given.is_complex():
            return torch.ones_like(given)
    elif isinstance(given, (tuple, list)) and len(given) == 2:
        return torch.ones_like(given[0]), torch.zeros_like(given[1])
    raise PlanError(f"rotations of an unknown form: {type(given).__name__}")


def _get_first(rotations: Any) -> torch.Tensor:
    tensor = rotations if isinstance(rotations, torch.Tensor) else rotations[0]
    assert isinstance(tensor, torch.Tensor)
    return tensor
