"""Run a model: options of every forward pass over data, and small inputs to run it once."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from surgery.models.sites import get_text_config
from surgery.models.sites.names import CACHES

TOKENS = 16
# The argument that gives states to a decoder without its encoder.
ENCODED = "encoder_hidden_states"


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


def make_probe_inputs(
    model: PreTrainedModel, *, cross: bool = False, mask: bool = False
) -> dict[str, Any]:
    """Make the arguments of one forward pass of `model`, on its device.

    Args:
        mask: whether to add a mask without padding.
        cross: whether to add states for cross-attention if the model has no encoder.
    """
    device, config = model.device, model.config
    if model.main_input_name == "pixel_values":
        return {"pixel_values": _make_pixels(config, device).to(model.dtype)}
    if model.main_input_name in ("input_features", "input_values"):
        return dict(model.dummy_inputs)
    vocabulary = get_vocabulary_size(config)
    # Different tokens, but not the first ones of the vocabulary, which are often special.
    rows = _count_codebooks(config)
    tokens = torch.arange(3, 3 + rows * TOKENS, device=device).view(rows, TOKENS) % vocabulary
    inputs: dict[str, Any] = {"input_ids": tokens}
    parameters = inspect.signature(model.forward).parameters
    if mask and "attention_mask" in parameters:
        inputs["attention_mask"] = torch.ones_like(tokens)
    if config.is_encoder_decoder and "decoder_input_ids" in parameters:
        inputs["decoder_input_ids"] = (tokens + 1) % vocabulary
    elif cross and ENCODED in parameters:
        inputs[ENCODED] = _make_states(model)
    elif cross and "encoder_outputs" in parameters:
        inputs["encoder_outputs"] = (_make_states(model),)
    if "use_cache" in parameters or "kwargs" in parameters:
        inputs |= _get_probe_options(model)
    return inputs


def _get_probe_options(model: PreTrainedModel) -> dict[str, bool]:
    try:
        return get_forward_options(model)
    except ValueError:  # several text models in one
        return {"use_cache": False}


def get_vocabulary_size(config: PreTrainedConfig) -> int:
    for holder in (get_text_config(config), config, getattr(config, "decoder", None)):
        size = getattr(holder, "vocab_size", None)
        if isinstance(size, int) and size > 0:
            return size
    return TOKENS + 3


def _count_codebooks(config: PreTrainedConfig) -> int:
    """Count the rows of tokens of one sequence of audio codes (MusicGen)."""
    count = getattr(getattr(config, "decoder", config), "num_codebooks", 1)
    return count if isinstance(count, int) and "musicgen" in config.model_type else 1


def _make_states(model: PreTrainedModel) -> torch.Tensor:
    width = _get_width(model.config)
    states = torch.linspace(-1, 1, TOKENS * width, device=model.device, dtype=model.dtype)
    return states.view(1, TOKENS, width).sin()


def _get_width(config: PreTrainedConfig) -> int:
    text = get_text_config(config)
    for name in ("cross_attention_hidden_size", "hidden_size", "d_model"):
        size = getattr(text, name, None)
        if isinstance(size, int):
            return size
    raise ValueError("the config has no hidden size")


def _make_pixels(config: PreTrainedConfig, device: torch.device) -> torch.Tensor:
    holder: Any = getattr(config, "vision_config", config)
    size: Any = getattr(holder, "image_size", 224)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    shape = (1, getattr(holder, "num_channels", 3), height, width)
    return torch.linspace(-9, 9, torch.Size(shape).numel(), device=device).view(shape).sin()
