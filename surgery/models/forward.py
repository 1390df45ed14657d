"""Run a model: options of every forward pass over data, its mode and its backend."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from surgery.models.sites.names import CACHES


def get_forward_options(model: PreTrainedModel) -> dict[str, bool]:
    """Return the options of a forward pass over whole windows: they turn off the cache.

    This is not only cheaper. transformers isolates packed documents (by `position_ids` that start
    again) only if there is no cache; with a cache, attention silently crosses document borders.
    """
    cached = getattr(model.config.get_text_config(), "use_cache", False)
    return {"use_cache": False} if cached else {}


def get_cache(model: PreTrainedModel, output: Any) -> dict[str, Any]:
    """Get the cache in a model's output, as the argument of its next forward pass.

    Returns:
        The argument's name → the cache; nothing if the output has none.
    """
    parameters = inspect.signature(model.forward).parameters
    name = next((name for name in CACHES if name in parameters), "past_key_values")
    cache = getattr(output, name, None)
    return {} if cache is None else {name: cache}


def find_device(model: nn.Module) -> torch.device:
    """Find the device for the inputs of `model`: that of its first weight with values."""
    devices = (p.device for p in model.parameters() if not p.is_meta)
    return next(devices, torch.device("cpu"))  # hooks that offload every weight move inputs too


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put all modules into eval mode inside the block, and restore their modes after it."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def using_implementation(model: nn.Module, implementation: str) -> Iterator[None]:
    """Use another backend in all parts of the model, and restore the old one after the block."""
    backends: dict[int, tuple[PreTrainedConfig, str | None]] = {}
    for module in model.modules():
        for config in _list_configs(getattr(module, "config", None)):
            backends.setdefault(id(config), (config, config._attn_implementation))
    try:
        for config, _ in backends.values():
            config._attn_implementation = implementation
        yield
    finally:
        for config, before in backends.values():  # a config first: setting it also sets its parts
            config._attn_implementation = before


def _list_configs(config: Any) -> Iterator[PreTrainedConfig]:
    if isinstance(config, PreTrainedConfig):
        yield config
        for name in config.sub_configs:
            yield from _list_configs(getattr(config, name, None))
