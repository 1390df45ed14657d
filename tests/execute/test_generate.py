"""Operated models at work: with a cache, without one, padded and alone, they say the same."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel, StaticCache

from surgery.execute.live import apply_
from tests.families import HEADS, SEPARATE, family, tokens
from tests.operations.reference import gqa_plan

NEW = 6
# Recurrent layers run over the padding.
RECURRENT = {"falcon_h1", "minimax"}


def operated(name: str, dtype: torch.dtype = torch.float64, **options: object) -> PreTrainedModel:
    model = family(name, dtype=dtype)
    return apply_(model, gqa_plan(model, 2, **options))


def generated(model: PreTrainedModel, ids: torch.Tensor, **options: object) -> torch.Tensor:
    options = {"attention_mask": torch.ones_like(ids), **options}
    out = model.generate(
        input_ids=ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **options
    )
    return out[:, ids.shape[1] :]


@pytest.mark.parametrize("name", SEPARATE)
def test_decoding_with_a_cache_equals_decoding_without(name: str) -> None:
    model, ids = operated(name), tokens(2, 9)
    assert torch.equal(generated(model, ids), generated(model, ids, use_cache=False))


@pytest.mark.parametrize("name", sorted(set(SEPARATE) - RECURRENT))
def test_a_left_padded_prompt_goes_on_as_it_does_alone(name: str) -> None:
    # Eager attention, which gemma2 needs, gives NaN for a masked row in fp64.
    model = operated(name, torch.float32 if name == "gemma2" else torch.float64)
    ids = tokens(2, 9)
    ids[0, :4], mask = model.config.pad_token_id, torch.ones_like(ids)
    mask[0, :4] = 0
    together = generated(model, ids, attention_mask=mask)
    assert torch.equal(together[:1], generated(model, ids[:1, 4:]))
    assert torch.equal(together[1:], generated(model, ids[1:]))


@pytest.mark.parametrize("name", ["llama", "olmo2", "stablelm"])
def test_layers_may_differ_in_what_they_cache(name: str) -> None:
    model, ids = operated(name, layers=[1]), tokens(2, 9)
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    assert [layer.keys.shape[1] for layer in cache.layers] == [HEADS, 2]
    assert torch.equal(generated(model, ids), generated(model, ids, use_cache=False))


def test_a_preallocated_cache_has_the_new_size() -> None:
    model, ids = operated("llama"), tokens(2, 9)
    cache = StaticCache(config=model.config, max_cache_len=16)
    assert torch.equal(generated(model, ids, past_key_values=cache), generated(model, ids))
    assert cache.layers[0].keys.shape[1] == 2


@pytest.mark.parametrize("name", ["llama", "gemma3", "olmo2", "qwen2", "starcoder2"])
def test_attention_backends_agree(name: str) -> None:
    model, ids = operated(name, torch.float32), tokens()
    ids[0, :4], mask = model.config.pad_token_id, torch.ones_like(ids)
    mask[0, :4] = 0
    found = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            found.append(model(input_ids=ids, attention_mask=mask, use_cache=False).logits)
    visible = mask.bool()
    torch.testing.assert_close(found[0][visible], found[1][visible], rtol=0, atol=1e-5)
