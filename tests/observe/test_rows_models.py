"""Entropy of every row, under any backend, equals that of the map eager attention returns."""

from __future__ import annotations

import pytest
import torch

from surgery.observe.rows import compute_row_logits
from tests.observe.explicit import (
    assert_close,
    entropies,
    entropy_of,
    explicit_maps,
    recorded_calls,
)
from tests.tiny_models import tiny_model, tokens

LENGTH = 12
# mistral's, gemma2's and modernbert's windows are shorter than the text.
CASES = [
    *[(name, "eager") for name in ("llama", "qwen3", "mistral", "gemma2", "gpt2", "bert")],
    *[(name, "sdpa") for name in ("llama", "qwen3", "mistral", "gpt2", "bert", "modernbert")],
]


def batch_with(padding: str) -> dict[str, torch.Tensor]:
    ids = tokens(3, LENGTH)
    if padding == "none":
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    if padding == "right":
        mask[0, 5:], mask[2, 11:] = 0, 0
    else:
        mask[0, :5], mask[2, :1] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize(("name", "attention"), CASES)
def test_entropy_of_every_real_row(name: str, attention: str, padding: str) -> None:
    batch = batch_with(padding)
    maps = explicit_maps(tiny_model(name, "eager"), **batch)
    calls = recorded_calls(tiny_model(name, attention), **batch)
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    assert len(calls) == len(maps) == 2
    for call, explicit in zip(calls, maps, strict=True):
        got, expected = entropies(call).transpose(1, 2), entropy_of(explicit).transpose(1, 2)
        assert_close(got[real], expected[real])


@pytest.mark.parametrize("padding", ["none", "right"])
def test_probabilities_are_the_map(padding: str) -> None:
    """Not only the entropy: softmax of the logits is the map itself, grouped heads in order."""
    batch = batch_with(padding)
    maps = explicit_maps(tiny_model("llama", "eager"), **batch)
    for call, explicit in zip(recorded_calls(tiny_model("llama"), **batch), maps, strict=True):
        got = compute_row_logits(call, torch.arange(LENGTH)).softmax(-1)
        torch.testing.assert_close(got, explicit, atol=1e-5, rtol=0)


def test_heads_per_kv_head_may_be_one_or_all() -> None:
    for kv_heads in (1, 4):
        ids = tokens(2, LENGTH)
        maps = explicit_maps(
            tiny_model("llama", "eager", num_key_value_heads=kv_heads), input_ids=ids
        )
        model = tiny_model("llama", "sdpa", num_key_value_heads=kv_heads)
        for call, explicit in zip(recorded_calls(model, input_ids=ids), maps, strict=True):
            assert_close(entropies(call), entropy_of(explicit))


def test_the_sink_is_one_more_column() -> None:
    model = tiny_model("gpt_oss", "eager")
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.sinks.data = torch.linspace(-2, 2, 4) + index
    batch = batch_with("right")
    maps = explicit_maps(model, **batch)
    real = batch["attention_mask"].bool()
    for call, explicit in zip(recorded_calls(model, **batch), maps, strict=True):
        # The returned map leaves the sink's share out.
        sink = 1 - explicit.double().sum(-1, keepdim=True)
        assert sink.mean() > 0.1
        expected = entropy_of(torch.cat([explicit, sink.clamp_min(0)], -1)).transpose(1, 2)
        assert_close(entropies(call).transpose(1, 2)[real], expected[real])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_position_bias_and_cross_attention(attention: str) -> None:
    inputs = batch_with("right")
    batch = inputs | {"decoder_input_ids": tokens(3, 5, seed=1)}
    eager = tiny_model("t5", "eager")
    with torch.no_grad():
        output = eager(**batch, output_attentions=True)
    expected = {}
    for layer in range(2):
        expected[f"encoder.block.{layer}.layer.0.SelfAttention"] = output.encoder_attentions[layer]
        expected[f"decoder.block.{layer}.layer.0.SelfAttention"] = output.decoder_attentions[layer]
        expected[f"decoder.block.{layer}.layer.1.EncDecAttention"] = output.cross_attentions[layer]
    calls = recorded_calls(tiny_model("t5", attention), **batch)
    assert {call.site for call in calls} == set(expected)
    for call in calls:
        real = torch.ones(3, call.query.shape[2], dtype=torch.bool)
        if call.site.startswith("encoder."):
            real = inputs["attention_mask"].bool()
        explicit = entropy_of(expected[call.site]).transpose(1, 2)
        assert_close(entropies(call).transpose(1, 2)[real], explicit[real])


def test_attention_logits_are_single_precision_under_autocast() -> None:
    call = recorded_calls(tiny_model("llama"), input_ids=tokens(2, LENGTH))[0]
    exact = compute_row_logits(call, torch.arange(LENGTH))
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = compute_row_logits(call, torch.arange(LENGTH))
    assert torch.equal(under_autocast, exact)


def test_half_precision_and_inference_mode() -> None:
    """The rows of a bfloat16 model are those of its bfloat16 queries and keys, in float64."""
    model = tiny_model("llama").to(torch.bfloat16)
    with torch.inference_mode():
        for call in recorded_calls(model, input_ids=tokens(2, LENGTH)):
            key = call.key.double().repeat_interleave(2, dim=1)
            scores = call.query.double() @ key.transpose(-1, -2) * 8**-0.5
            causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
            explicit = scores.masked_fill(~causal, float("-inf")).softmax(-1)
            assert_close(entropies(call), entropy_of(explicit))
