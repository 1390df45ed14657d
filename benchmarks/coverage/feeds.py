"""What a forward pass of each model type is given."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.coverage.shrink import IMAGE

# Types whose `input_ids` are audio codes, a row per codebook.
AUDIO_CODES = {"musicgen_decoder", "musicgen_melody_decoder"}
FIRST, LAST = 8, 80  # random token ids: no special ones and no markers
LENGTH = 12  # of each row; sliding windows are shorter


def feed(
    kind: str, model: PreTrainedModel, *, batch: int = 2, length: int = LENGTH, seed: int = 0
) -> dict[str, Any]:
    """Forward arguments of `model`, the same at every call."""
    random = torch.Generator().manual_seed(seed)
    config = model.config
    accepted = inspect.signature(model.forward).parameters
    if kind == "image-classification" and config.model_type not in ("imagegpt", "shieldgemma2"):
        return _image(model, batch, random)
    codebooks = config.num_codebooks if config.model_type in AUDIO_CODES else 1
    ids = torch.randint(FIRST, LAST, (batch * codebooks, length), generator=random)
    given: dict[str, Any] = {"input_ids": ids}
    if "attention_mask" in accepted:
        given["attention_mask"] = torch.ones(batch, length, dtype=torch.long)
    if kind == "seq2seq-lm" and "decoder_input_ids" in accepted:
        given["decoder_input_ids"] = torch.randint(FIRST, LAST, (batch, length), generator=random)
    if "use_cache" in accepted:
        given["use_cache"] = False
    if config.model_type in EXTRA:
        EXTRA[config.model_type](given, model, random)
    return given


def _image(model: PreTrainedModel, batch: int, random: torch.Generator) -> dict[str, Tensor]:
    config = model.config
    vision = getattr(config, "vision_config", None) or config
    channels = getattr(vision, "num_channels", 3)
    if config.model_type == "siglip2":  # takes patches
        side = int(vision.num_patches**0.5)
        patches = torch.randn(batch, side * side, channels * vision.patch_size**2, generator=random)
        return {
            "pixel_values": patches.to(model.dtype),
            "pixel_attention_mask": torch.ones(batch, side * side, dtype=torch.long),
            "spatial_shapes": torch.full((batch, 2), side),
        }
    size = getattr(vision, "image_size", None) or IMAGE
    height, width = size if isinstance(size, list | tuple) else (size, size)
    pixels = torch.randn(batch, channels, height, width, generator=random)
    return {"pixel_values": pixels.to(model.dtype)}


def _voxtral_realtime(
    given: dict[str, Any], model: PreTrainedModel, random: torch.Generator
) -> None:
    """As many mel frames as there are text tokens times the encoder's downsampling."""
    batch, length = given["input_ids"].shape
    audio = model.config.audio_config
    frames = length * model.config.audio_length_per_tok
    mel = torch.randn(batch, audio.num_mel_bins, frames, generator=random)
    given["input_features"] = mel.to(model.dtype)


def _shieldgemma2(given: dict[str, Any], model: PreTrainedModel, random: torch.Generator) -> None:
    """The image's tokens come first."""
    batch = len(given["input_ids"])
    tokens = model.config.mm_tokens_per_image
    given["input_ids"][:, :tokens] = model.config.image_token_index
    given |= _image(model, batch, random)


def _audio(given: dict[str, Any], model: PreTrainedModel, random: torch.Generator) -> None:
    """A short recording; its tokens come first."""
    config = model.config
    frames, tokens = AUDIO[config.model_type]
    audio = getattr(config, "audio_config", None) or config.encoder_config
    audio = getattr(audio, "asr_config", audio)
    batch = len(given["input_ids"])
    shape = (batch, audio.num_mel_bins, frames)
    mel = torch.randn(shape, generator=random).to(model.dtype)
    accepted = inspect.signature(model.forward).parameters
    time_first = config.model_type in ("granite_speech", "granite_speech_plus", "nemo_speechlm")
    given["input_features"] = mel.mT.contiguous() if time_first else mel
    given["input_ids"][:, :tokens] = config.audio_token_id
    for name in ("input_features_mask", "feature_attention_mask"):
        if name in accepted and not config.model_type.startswith("granite"):
            given[name] = torch.ones(batch, frames, dtype=torch.long)
    if config.model_type == "qwen3_asr":  # takes whole windows of 100 frames
        given["input_features"] = torch.nn.functional.pad(mel, (0, 100 - frames))
        mask = given["input_features_mask"]
        given["input_features_mask"] = torch.nn.functional.pad(mask, (0, 100 - frames))


# Type → mel frames, and the audio tokens that they make.
AUDIO = {
    "audioflamingo3": (32, 8),
    "glmasr": (32, 4),
    "granite_speech": (30, 6),
    "granite_speech_plus": (30, 6),
    "nemo_speechlm": (32, 4),
    "qwen2_audio": (32, 8),
    "qwen3_asr": (32, 4),
    "voxtral": (32, 4),
}

# Model type → what its arguments differ in.
EXTRA: dict[str, Callable[[dict[str, Any], PreTrainedModel, torch.Generator], None]] = {
    "shieldgemma2": _shieldgemma2,
    "voxtral_realtime": _voxtral_realtime,
} | dict.fromkeys(AUDIO, _audio)
