"""Decoding from a cache: does it give what a whole pass gives, and hold what was planned?"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from surgery.models.forward import get_cache

PROMPT = 8


def cached_difference(model: PreTrainedModel, given: dict[str, Any]) -> float:
    """Largest difference between logits of one pass and of token after token, relative.

    Raises whatever the model raises where it takes no cache or needs more than tokens.
    """
    tokens = given["input_ids"]
    whole = model(input_ids=tokens, use_cache=False).logits
    output = model(input_ids=tokens[:, :PROMPT], use_cache=True)
    steps = [output.logits]
    for place in range(PROMPT, tokens.shape[1]):
        output = model(
            input_ids=tokens[:, place : place + 1],
            **get_cache(model, output),
            use_cache=True,
        )
        steps.append(output.logits)
    difference = (torch.cat(steps, dim=1) - whole).abs().max()
    return float(difference / whole.abs().max())


def cache_bytes(model: PreTrainedModel, given: dict[str, Any]) -> int:
    """Bytes of keys and values of one sequence, in the cache that transformers really makes."""
    (cache,) = get_cache(model, model(input_ids=given["input_ids"], use_cache=True)).values()
    cache = getattr(cache, "self_attention_cache", cache)
    held = 0
    for layer in cache.layers:
        for states in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if isinstance(states, torch.Tensor):
                held += states.numel() // len(states) * states.element_size()
    return held
