"""A model type's default config, shrunk: the product's own rule, and what it cannot do."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from benchmarks.coverage.exceptions import EXCEPTIONS
from surgery.models.tiny import (
    HEADS,
    IMAGE,
    KV_HEADS,
    get_field,
    holds_numbers,
    list_tiny_fields,
    shape_like,
)

__all__ = ["IMAGE", "tiny_config"]

# Types other than latent attention that accept no fewer KV heads than query heads.
AS_MANY = {
    "esmc",
    "nemotron3_5_transcribe_asr_audio",
    "nemotron3_5_transcribe_word_timestamp",
    "nemotron3_diarization_audio",
}


def exception(config: PreTrainedConfig) -> dict[str, Any]:
    """What this config's type is given instead of what the rule would give."""
    return EXCEPTIONS.get(type(config).__name__) or EXCEPTIONS.get(config.model_type) or {}


def tiny_config(
    model_type: str, *, decoder: bool, kv_heads: int | None, **extra: Any
) -> PreTrainedConfig:
    """The default config of `model_type`, shrunk; `decoder`: causal, if the type can be both."""
    default = AutoConfig.for_model(model_type)
    found = list_tiny_fields(default, lambda config: _own_fields(config, kv_heads)) | extra
    if decoder and not default.is_encoder_decoder and hasattr(default, "is_decoder"):
        found["is_decoder"] = True
    return AutoConfig.for_model(model_type, **found)


def _own_fields(config: PreTrainedConfig, kv_heads: int | None) -> dict[str, Any]:
    """Exceptions, and the number of KV heads in the words of this config."""
    if get_field(config, "kv_lora_rank") is not None or config.model_type in AS_MANY:
        kv_heads = None
    counted: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        name, value = field.name, get_field(config, field.name)
        if name == "multi_query":
            counted[name] = kv_heads == 1
        elif name == "new_decoder_architecture":  # Falcon's: the one that reads `num_kv_heads`
            counted[name] = kv_heads not in (None, 1, HEADS)
        elif kv_heads and name in KV_HEADS and (value is None or holds_numbers(value)):
            counted[name] = shape_like(value, kv_heads)
    own = exception(config)
    return {name: value for name, value in own.items() if name not in counted} | counted
