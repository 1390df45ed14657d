"""With a KV cache the last rows of the text see what they see without one."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from tests.observe.explicit import (
    assert_close,
    entropies,
    entropy_of,
    explicit_maps,
    recorded_calls,
)
from tests.tiny_models import tiny_model, tokens

PREFIX, LENGTH = 8, 11


def explicit_rows(name: str, ids: torch.Tensor, mask: torch.Tensor | None) -> list[torch.Tensor]:
    maps = explicit_maps(tiny_model(name, "eager"), input_ids=ids, attention_mask=mask)
    return [entropy_of(layer) for layer in maps]


@torch.no_grad()
def prefilled(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model(
        input_ids=ids[:, :PREFIX],
        attention_mask=None if mask is None else mask[:, :PREFIX],
        past_key_values=cache,
    )
    return cache


@pytest.mark.parametrize("new", [1, LENGTH - PREFIX])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_continuation(name: str, attention: str, padded: bool, new: int) -> None:
    ids = tokens(2, PREFIX + new)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    expected = explicit_rows(name, ids, mask if padded else None)
    model = tiny_model(name, attention)
    cache = prefilled(model, ids, mask if padded else None)
    calls = recorded_calls(
        model,
        input_ids=ids[:, PREFIX:],
        attention_mask=mask if padded else None,
        past_key_values=cache,
    )
    for call, rows in zip(calls, expected, strict=True):
        assert call.query.shape[2] == new < call.key.shape[2]
        assert_close(entropies(call), rows[:, :, PREFIX:])


def test_prefill_of_a_static_cache() -> None:
    """The keys are as many as the cache is long, and sdpa is given no mask at all."""
    ids = tokens(2, PREFIX)
    model = tiny_model("llama")
    cache = StaticCache(config=model.config, max_cache_len=20)
    calls = recorded_calls(model, input_ids=ids, past_key_values=cache)
    for call, rows in zip(calls, explicit_rows("llama", ids, None), strict=True):
        assert call.mask is None
        assert call.key.shape[2] == 20
        assert_close(entropies(call), rows)
