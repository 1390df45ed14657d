"""Masks of every kind, and of none: what a backend makes of them, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers.models.llama.modeling_llama import eager_attention_forward

from surgery.errors import TapError
from surgery.observe.rows import compute_row_logits
from tests.observe.explicit import assert_close, entropies, recorded_calls
from tests.tiny_models import tiny_model, tokens


def test_an_unknown_mask() -> None:
    call = recorded_calls(tiny_model("llama"), input_ids=tokens(1, 5))[0]
    odd = replace(call, mask="causal", implementation="homegrown")
    with pytest.raises(TapError, match=r"layers\.0\.self_attn.*mask of type str under homegrown"):
        compute_row_logits(odd, torch.arange(5))


def test_eager_attention_without_a_mask_sees_all() -> None:
    call = recorded_calls(tiny_model("llama", "eager"), input_ids=tokens(2, 6))[0]
    _, explicit = eager_attention_forward(
        call.module, call.query, call.key, call.value, None, scaling=call.options["scaling"]
    )
    assert (explicit > 0).all()
    got = compute_row_logits(replace(call, mask=None), torch.arange(6)).softmax(-1)
    torch.testing.assert_close(got, explicit)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_masked_keys_have_no_logit(attention: str) -> None:
    ids = tokens(1, 6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    call = recorded_calls(tiny_model("llama", attention), input_ids=ids, attention_mask=mask)[0]
    visible = torch.ones(6, 6, dtype=torch.bool).tril() & mask.bool()
    logits = compute_row_logits(call, torch.arange(6))
    assert torch.equal(logits > float("-inf"), visible.expand(1, 4, 6, 6))


def test_an_added_mask_may_be_a_bias() -> None:
    """Only the smallest numbers of its type hide a key; others shift its logit."""
    eager = tiny_model("llama", "eager")
    ids = tokens(1, 6)
    call = recorded_calls(eager, input_ids=ids)[0]
    bias = torch.linspace(-3, 3, 36).reshape(1, 1, 6, 6)
    biased = recorded_calls(eager, input_ids=ids, attention_mask=call.mask + bias)[0]
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    plain = compute_row_logits(call, torch.arange(6))
    expected = (plain + bias).masked_fill(~causal, float("-inf"))
    torch.testing.assert_close(compute_row_logits(biased, torch.arange(6)), expected)
    p = expected.double().softmax(-1)
    assert_close(entropies(biased), torch.special.entr(p).sum(-1))
