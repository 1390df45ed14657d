"""A few rows and tokens of a batch, cut alike out of all of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers import Cache

ROWS = 2
TOKENS = 1024

IGNORED = -100
# Read once per token, [B, N, …]; the decoder of an encoder-decoder has a length of its own.
_TOKENS = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids")
_DECODER_TOKENS = (
    "decoder_input_ids",
    "decoder_inputs_embeds",
    "decoder_attention_mask",
    "decoder_position_ids",
    "labels",
)
_MAIN = ("input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features")
# What says nothing about attention: caches, and what is to be computed or returned besides.
_DROPPED = (
    "past_key_values",
    "use_cache",
    "cache_position",
    "cache_params",
    "logits_to_keep",
    "num_logits_to_keep",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "return_loss",
)


class Excerpt(NamedTuple):
    """Part of a batch.

    Attributes:
        inputs: keyword arguments of a forward pass.
        real: [rows, tokens], which positions of the output are no padding; ``None``: all.
        text: how much of the batch it is.
    """

    inputs: dict[str, Any]
    real: torch.Tensor | None
    text: str


def excerpt(
    batch: Mapping[str, Any], *, encoder_decoder: bool, rows: int = ROWS, tokens: int = TOKENS
) -> Excerpt | None:
    """The first `rows` of a batch, and of these at most `tokens` tokens.

    Tokens are the first ones, or the last ones where most padding comes first. A batch with
    anything in it that is not known to follow rows and tokens is taken whole.

    Args:
        batch: keyword arguments of a forward pass.
        encoder_decoder: whether the model makes its decoder's inputs from labels.

    Returns:
        ``None`` for a step of generation, whose past lies in a cache, and for no input at all.
    """
    cache = batch.get("past_key_values")
    if cache is not None and not (isinstance(cache, Cache) and cache.get_seq_length() == 0):
        return None
    given = {k: v for k, v in batch.items() if v is not None and k not in _DROPPED}
    if not encoder_decoder or "decoder_input_ids" in given:
        given.pop("labels", None)
    named = next((name for name in _MAIN if name in given), None)
    if named is None:
        return None
    main: torch.Tensor = given[named]
    if not all(_is_known(name, value, main) for name, value in given.items()):
        return Excerpt(given, _real(given, encoder_decoder), "the whole batch")
    kept = min(rows, main.shape[0])
    cut = {name: _rows(name, value, main.shape[0], kept) for name, value in given.items()}
    text = f"{kept} of {main.shape[0]} rows"
    if named in _TOKENS:
        length = main.shape[1]
        window = _window(cut.get("attention_mask"), length, tokens)
        cut = {
            name: _tokens(name, value, length, window) if name in _TOKENS else value
            for name, value in cut.items()
        }
        text += f", {len(range(*window.indices(length)))} of {length} tokens"
    for name in _DECODER_TOKENS:
        if name in cut:
            cut[name] = cut[name][:, :tokens]
    return Excerpt(cut, _real(cut, encoder_decoder), text)


def _is_known(name: str, value: Any, main: torch.Tensor) -> bool:
    if not isinstance(value, torch.Tensor):
        return isinstance(value, (bool, int, float, str))
    if value is main:
        return True
    if name not in _TOKENS and name not in _DECODER_TOKENS:
        return False
    return value.ndim >= 2 and value.shape[_row_dim(name, value)] in (1, main.shape[0])


def _row_dim(name: str, value: torch.Tensor) -> int:
    # One set of positions per axis, where images have several: [3, B, N].
    return 1 if name == "position_ids" and value.ndim == 3 else 0


def _rows(name: str, value: Any, rows: int, kept: int) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    dim = _row_dim(name, value)
    return value.narrow(dim, 0, kept) if value.shape[dim] == rows else value


def _window(mask: Any, length: int, tokens: int) -> slice:
    if length <= tokens:
        return slice(0, length)
    first, last = slice(0, tokens), slice(length - tokens, length)
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        return last if int(mask[:, last].sum()) > int(mask[:, first].sum()) else first
    return first


def _tokens(name: str, value: Any, length: int, window: slice) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if name == "attention_mask" and value.ndim == 4:  # [B, heads or 1, N, N]
        return value[:, :, window if value.shape[2] == length else slice(None), window]
    start = _row_dim(name, value) + 1
    if value.shape[start] != length:
        return value
    return value[(slice(None),) * start + (window,)]


def _real(inputs: Mapping[str, Any], encoder_decoder: bool) -> torch.Tensor | None:
    mask = inputs.get("attention_mask")
    if encoder_decoder:
        mask, labels = inputs.get("decoder_attention_mask"), inputs.get("labels")
        if mask is None and labels is not None:
            mask = labels != IGNORED
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        return mask.bool()
    return None
