"""Cut a few rows and tokens of a batch, the same ones from all of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers import Cache

from surgery.models.sites.names import CACHES

ROWS = 2
TOKENS = 1024

IGNORED = -100
# One entry per token, [B, N, …]; the decoder of an encoder-decoder has its own length.
_TOKENS = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids")
_DECODER_TOKENS = (
    "decoder_input_ids",
    "decoder_inputs_embeds",
    "decoder_attention_mask",
    "decoder_position_ids",
    "labels",
)
_MAIN = ("input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features")
# Arguments that do not change attention: caches, and what to compute or return besides.
_DROPPED = (
    *CACHES,
    "use_cache",
    "cache_position",
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
        real: [rows, tokens], which positions of the output are not padding; ``None``: all.
        text: how much of the batch it is, for a person.
    """

    inputs: dict[str, Any]
    real: torch.Tensor | None
    text: str


def cut_excerpt(
    batch: Mapping[str, Any], *, encoder_decoder: bool, rows: int = ROWS, tokens: int = TOKENS
) -> Excerpt | None:
    """Cut the first `rows` of a batch, and of these at most `tokens` tokens.

    These are the first tokens, or the last ones if most padding comes first. A batch with an
    unknown argument, which may have another layout, is taken whole.

    Args:
        batch: keyword arguments of a forward pass.
        encoder_decoder: whether the model makes its decoder's inputs from labels.

    Returns:
        ``None`` for a step of generation with a filled cache, and if there is no input.
    """
    for name in CACHES:
        cache = batch.get(name)
        if cache is not None and not (isinstance(cache, Cache) and cache.get_seq_length() == 0):
            return None
    inputs = {k: v for k, v in batch.items() if v is not None and k not in _DROPPED}
    if not encoder_decoder or "decoder_input_ids" in inputs:
        inputs.pop("labels", None)
    main_name = next((name for name in _MAIN if name in inputs), None)
    if main_name is None:
        return None
    main: torch.Tensor = inputs[main_name]
    if not all(_is_known(name, value, main) for name, value in inputs.items()):
        return Excerpt(inputs, _find_real(inputs, encoder_decoder), "the whole batch")
    kept = min(rows, main.shape[0])
    cut = {name: _cut_rows(name, value, main.shape[0], kept) for name, value in inputs.items()}
    text = f"{kept} of {main.shape[0]} rows"
    if main_name in _TOKENS:
        length = main.shape[1]
        window = _choose_window(cut.get("attention_mask"), length, tokens)
        cut = {
            name: _cut_tokens(name, value, length, window) if name in _TOKENS else value
            for name, value in cut.items()
        }
        text += f", {len(range(*window.indices(length)))} of {length} tokens"
    for name in _DECODER_TOKENS:
        if name in cut:
            cut[name] = cut[name][:, :tokens]
    return Excerpt(cut, _find_real(cut, encoder_decoder), text)


def _is_known(name: str, value: Any, main: torch.Tensor) -> bool:
    if isinstance(value, Mapping):  # masks by kind of layer
        return all(each is None or _is_known(name, each, main) for each in value.values())
    if not isinstance(value, torch.Tensor):
        return isinstance(value, (bool, int, float, str))
    if value is main:
        return True
    if name not in _TOKENS and name not in _DECODER_TOKENS:
        return False
    return value.ndim >= 2 and value.shape[_find_row_dim(name, value)] in (1, main.shape[0])


def _find_row_dim(name: str, value: torch.Tensor) -> int:
    # Models for images have positions for several axes: [3, B, N].
    return 1 if name == "position_ids" and value.ndim == 3 else 0


def _cut_rows(name: str, value: Any, rows: int, kept: int) -> Any:
    if isinstance(value, Mapping):
        return {kind: _cut_rows(name, each, rows, kept) for kind, each in value.items()}
    if not isinstance(value, torch.Tensor):
        return value
    dim = _find_row_dim(name, value)
    return value.narrow(dim, 0, kept) if value.shape[dim] == rows else value


def _choose_window(mask: Any, length: int, tokens: int) -> slice:
    if length <= tokens:
        return slice(0, length)
    first, last = slice(0, tokens), slice(length - tokens, length)
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        return last if int(mask[:, last].sum()) > int(mask[:, first].sum()) else first
    return first


def _cut_tokens(name: str, value: Any, length: int, window: slice) -> Any:
    if isinstance(value, Mapping):
        return {kind: _cut_tokens(name, each, length, window) for kind, each in value.items()}
    if not isinstance(value, torch.Tensor):
        return value
    if name == "attention_mask" and value.ndim == 4:  # [B, heads or 1, N, N]
        return value[:, :, window if value.shape[2] == length else slice(None), window]
    start = _find_row_dim(name, value) + 1
    if value.shape[start] != length:
        return value
    return value[(slice(None),) * start + (window,)]


def _find_real(inputs: Mapping[str, Any], encoder_decoder: bool) -> torch.Tensor | None:
    mask = inputs.get("attention_mask")
    if encoder_decoder:
        mask, labels = inputs.get("decoder_attention_mask"), inputs.get("labels")
        if mask is None and labels is not None:
            mask = labels != IGNORED
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        return mask.bool()
    return None
