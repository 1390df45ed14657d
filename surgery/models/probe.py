"""Small inputs to run a model once: tokens, images, sound, whatever its own code asks for.

A model's `main_input_name` and the signature of its forward name the inputs; their shapes are in
its config, under names that differ. Where there is more than one possibility, each is tried on the
meta device, on a new model of the same config, and the first that runs is taken.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from surgery.models.config import get_config_part, list_config_prefixes
from surgery.models.forward import get_forward_options
from surgery.models.sites import get_text_config

TOKENS = 16
# The argument that gives states to a decoder without its encoder.
ENCODED = "encoder_hidden_states"
_DECODED = "decoder_input_ids"
# Inputs besides tokens, by the names that forwards give them.
_SENSES = (
    "pixel_values",
    "pixel_values_videos",
    "input_features",
    "input_values",
    "flattened_patches",
)
# Names in configs: features of a frame of sound, and how many frames.
_BINS = (
    "num_mel_bins",
    "input_feat_per_channel",
    "feature_projection_input_dim",
    "feature_size",
    "n_mels",
    "input_size",
    "input_dim",
)
_FRAMES = ("max_length", "spec_size")
# Name of an input → its shape.
Shapes = dict[str, tuple[int, ...]]
# Class, main input and config of models → what was chosen by trial.
_CHOSEN: dict[tuple[type, str, str], Shapes] = {}


def make_probe_inputs(
    model: PreTrainedModel, *, cross: bool = False, mask: bool = False
) -> dict[str, Any]:
    """Make the arguments of one forward pass of `model`, on its device.

    Args:
        mask: whether to add a mask without padding.
        cross: whether to add states for cross-attention if the model has no encoder.
    """
    shapes = _choose_shapes(model)
    inputs: dict[str, Any] = {}
    if "input_ids" in shapes:
        inputs = _make_text(model, cross=cross, mask=mask)
    for name, shape in shapes.items():
        if name == _DECODED:
            inputs[name] = _make_decoder_tokens(model)
        elif name != "input_ids":
            inputs[name] = _make_values(shape, model)
    parameters = inspect.signature(model.forward).parameters
    if shapes.keys() & {"input_ids", _DECODED} and parameters.keys() & {"use_cache", "kwargs"}:
        inputs |= _get_probe_options(model)
    return inputs


def list_input_names(model: PreTrainedModel) -> list[str]:
    """List the inputs that `make_probe_inputs` makes, for messages."""
    return list(_choose_shapes(model))


def _choose_shapes(model: PreTrainedModel) -> Shapes:
    """Choose what goes in; tokens have shapes of their own, and stand here with ``()``."""
    main = model.main_input_name
    main = main if isinstance(main, str) else main[0]
    candidates = list(_list_candidates(type(model), main, model.config)) or [{"input_ids": ()}]
    if len(candidates) == 1:
        return candidates[0]
    key = (type(model), main, model.config.to_json_string(use_diff=False))
    if key not in _CHOSEN:
        _CHOSEN[key] = _choose_by_trial(type(model), model.config, candidates)
    return _CHOSEN[key]


def _choose_by_trial(
    kind: type[PreTrainedModel], config: PreTrainedConfig, candidates: Sequence[Shapes]
) -> Shapes:
    """Choose the first candidate that a new model runs with; the first of all if none does."""
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"  # other implementations may need a GPU
    try:
        with torch.device("meta"):
            model = kind(config).eval()
    except Exception:  # what a class raises for its config is its own affair
        return candidates[0]
    return next((shapes for shapes in candidates if _runs(model, shapes)), candidates[0])


def _runs(model: PreTrainedModel, shapes: Shapes) -> bool:
    inputs: dict[str, Any] = {}
    if "input_ids" in shapes:
        inputs = _make_text(model, cross=False, mask=False)
    if _DECODED in shapes:
        inputs[_DECODED] = _make_decoder_tokens(model)
    inputs |= {name: _make_values(shape, model) for name, shape in shapes.items() if shape}
    try:
        with torch.no_grad():
            model(**inputs)
    except Exception:  # any error means that it asks for something else
        return False
    return True


def _list_candidates(
    kind: type[PreTrainedModel], main: str, config: PreTrainedConfig
) -> Iterator[Shapes]:
    """List what a model may ask for, the most likely first."""
    parameters = inspect.signature(kind.forward).parameters
    if main not in _SENSES and "input_ids" not in parameters:
        main = next((name for name in _SENSES if name in parameters), main)
    if main not in _SENSES:
        text: Shapes = {"input_ids": ()}
        if config.is_encoder_decoder and _DECODED in parameters:
            text[_DECODED] = ()
        yield text
        texts = [text, text | {_DECODED: ()}] if _DECODED in parameters else [text]
        for name in _SENSES:
            if name in parameters:
                shapes = list(_list_shapes(name, config))
                yield from (one | {name: shape} for one in texts for shape in shapes)
        return
    tokens: list[Shapes] = [{}]
    if _DECODED in parameters:
        tokens.insert(0 if config.is_encoder_decoder else 1, {_DECODED: ()})
    if "input_ids" in parameters:
        tokens = [{"input_ids": (), **more} for more in reversed(tokens)] + tokens
    shapes = list(_list_shapes(main, config))
    yield from ({main: shape, **more} for more, shape in itertools.product(tokens, shapes))


def _list_shapes(name: str, config: PreTrainedConfig) -> Iterator[tuple[int, ...]]:
    if name.startswith("pixel_values"):
        yield from _list_image_shapes(config)
    elif name == "flattened_patches":  # row, column, and the patch
        sizes = _find_sizes(config, ("patch_embed_hidden_size",))
        yield from ((1, TOKENS, 2 + size) for size in sizes)
        yield from ((1, TOKENS, 2 + 3 * size**2) for size in _find_sizes(config, ("patch_size",)))
    else:
        yield from _list_sound_shapes(config, waves=name == "input_values")


def _list_image_shapes(config: PreTrainedConfig) -> Iterator[tuple[int, ...]]:
    found = False
    for part in _list_parts(config):
        size: Any = getattr(part, "image_size", None)
        if not isinstance(size, (int, list, tuple)):
            continue
        found = True
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        channels = getattr(part, "num_channels", 3)
        frames = getattr(part, "num_frames", getattr(part, "frames_per_clip", None))
        if isinstance(frames, int):
            yield 1, frames, channels, height, width
        yield 1, channels, height, width
    if not found:
        yield 1, getattr(config, "num_channels", 3), 224, 224


def _list_sound_shapes(config: PreTrainedConfig, *, waves: bool) -> Iterator[tuple[int, ...]]:
    bins = _find_sizes(config, _BINS)
    strides = [s for part in _list_parts(config) if (s := getattr(part, "conv_stride", None))]
    samples = [math.prod(stride) * 2 * TOKENS for stride in strides]
    if waves:
        yield from ((1, length) for length in samples)
    frames = [2 * n for n in _find_sizes(config, ("max_source_positions",))]
    frames += [4 * TOKENS, *_find_sizes(config, _FRAMES)]
    for length, width in itertools.product(frames, bins):
        yield 1, width, length
        yield 1, length, width
        yield 1, 1, length, width
    if waves:
        yield 1, 1000 * TOKENS
        yield 1, 1, 1000 * TOKENS


def _find_sizes(config: PreTrainedConfig, names: tuple[str, ...]) -> list[int]:
    """Find the values of these keys in a config and its parts, each once."""
    found = [getattr(part, name, None) for part in _list_parts(config) for name in names]
    return list(dict.fromkeys(v for v in found if type(v) is int and v > 0))


def _list_parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    return [get_config_part(config, prefix) for prefix in list_config_prefixes(config)]


def _make_text(model: PreTrainedModel, *, cross: bool, mask: bool) -> dict[str, Any]:
    device, config = model.device, model.config
    parameters = inspect.signature(model.forward).parameters
    # Different tokens, but not the first ones of the vocabulary, which are often special.
    rows = 1 if config.is_encoder_decoder else _count_codebooks(config)
    tokens = torch.arange(3, 3 + rows * TOKENS, device=device).view(rows, TOKENS)
    inputs: dict[str, Any] = {"input_ids": tokens % get_vocabulary_size(config)}
    if mask and "attention_mask" in parameters:
        inputs["attention_mask"] = torch.ones_like(tokens)
    if config.is_encoder_decoder and _DECODED in parameters:
        pass
    elif cross and ENCODED in parameters:
        inputs[ENCODED] = _make_states(model)
    elif cross and "encoder_outputs" in parameters:
        inputs["encoder_outputs"] = (_make_states(model),)
    return inputs


def _make_decoder_tokens(model: PreTrainedModel) -> torch.Tensor:
    rows = _count_codebooks(model.config)
    tokens = torch.arange(4, 4 + rows * TOKENS, device=model.device).view(rows, TOKENS)
    return tokens % get_vocabulary_size(model.config)


def _make_values(shape: tuple[int, ...], model: PreTrainedModel) -> torch.Tensor:
    values = torch.linspace(-9, 9, math.prod(shape), device=model.device).view(shape).sin()
    return values.to(model.dtype)


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
