"""A few tokens, or a small picture, for running a model once."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from surgery.models.forward import no_cache

TOKENS = 16
# Where a decoder without its encoder is given something to look at.
ENCODED = "encoder_hidden_states"


def probe_inputs(
    model: PreTrainedModel, *, cross: bool = False, mask: bool = False
) -> dict[str, Any]:
    """Arguments for one forward pass of `model`, on its device.

    Args:
        mask: whether to say that no token is padding.
        cross: whether cross-attention without an encoder of its own should see some states.
    """
    device, config = model.device, model.config
    if model.main_input_name == "pixel_values":
        return {"pixel_values": _pixels(config, device).to(model.dtype)}
    if model.main_input_name in ("input_features", "input_values"):
        return dict(model.dummy_inputs)
    vocabulary = _vocabulary(config)
    # Neither all alike nor the first ones, which often are special.
    rows = _codebooks(config)
    tokens = torch.arange(3, 3 + rows * TOKENS, device=device).view(rows, TOKENS) % vocabulary
    inputs: dict[str, Any] = {"input_ids": tokens}
    taken = inspect.signature(model.forward).parameters
    if mask and "attention_mask" in taken:
        inputs["attention_mask"] = torch.ones_like(tokens)
    if config.is_encoder_decoder and "decoder_input_ids" in taken:
        inputs["decoder_input_ids"] = (tokens + 1) % vocabulary
    elif cross and ENCODED in taken:
        inputs[ENCODED] = _states(model)
    elif cross and "encoder_outputs" in taken:
        inputs["encoder_outputs"] = (_states(model),)
    if "use_cache" in taken or "kwargs" in taken:
        inputs |= _without_cache(model)
    return inputs


def _without_cache(model: PreTrainedModel) -> dict[str, bool]:
    try:
        return no_cache(model)
    except ValueError:  # several text models in one
        return {"use_cache": False}


def _vocabulary(config: PreTrainedConfig) -> int:
    for holder in (_text(config), config, getattr(config, "decoder", None)):
        size = getattr(holder, "vocab_size", None)
        if isinstance(size, int) and size > 0:
            return size
    return TOKENS + 3


def _codebooks(config: PreTrainedConfig) -> int:
    """Rows of tokens that one sequence of audio codes has (MusicGen)."""
    count = getattr(getattr(config, "decoder", config), "num_codebooks", 1)
    return count if isinstance(count, int) and "musicgen" in config.model_type else 1


def _states(model: PreTrainedModel) -> torch.Tensor:
    width = _width(model.config)
    states = torch.linspace(-1, 1, TOKENS * width, device=model.device, dtype=model.dtype)
    return states.view(1, TOKENS, width).sin()


def _width(config: PreTrainedConfig) -> int:
    text = _text(config)
    for name in ("cross_attention_hidden_size", "hidden_size", "d_model"):
        size = getattr(text, name, None)
        if isinstance(size, int):
            return size
    raise ValueError("the config states no hidden size")


def _text(config: PreTrainedConfig) -> PreTrainedConfig:
    try:
        return config.get_text_config()
    except ValueError:
        return config


def _pixels(config: PreTrainedConfig, device: torch.device) -> torch.Tensor:
    holder: Any = getattr(config, "vision_config", config)
    size: Any = getattr(holder, "image_size", 224)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    shape = (1, getattr(holder, "num_channels", 3), height, width)
    return torch.linspace(-9, 9, torch.Size(shape).numel(), device=device).view(shape).sin()
