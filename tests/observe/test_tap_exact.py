"""An open tap changes nothing: logits and gradients stay what they are, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from surgery.observe import AttentionCall, Tap
from surgery.observe.rows import compute_row_entropy, compute_row_logits
from tests.tiny_models import tiny_model, tokens

# Softcap (gemma2), sinks (gpt_oss) and biased relative positions (t5) included.
CASES = [
    *[(name, "eager") for name in ("llama", "qwen3", "mistral", "gemma2", "gpt_oss", "gpt2")],
    *[(name, "sdpa") for name in ("llama", "qwen3", "mistral", "gpt2")],
    *[(name, attention) for name in ("bert", "t5") for attention in ("eager", "sdpa")],
]


def forward_and_gradients(
    model: PreTrainedModel, batch: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    return output.logits.detach(), {n: p.grad for n, p in model.named_parameters()}


def padded_batch() -> dict[str, torch.Tensor]:
    ids = tokens(3, 12)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
    }


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_logits_and_gradients_are_identical_with_the_tap_open(name: str, attention: str) -> None:
    model = tiny_model(name, attention)
    batch = padded_batch()
    logits, gradients = forward_and_gradients(model, batch)

    def look(call: AttentionCall) -> None:
        """All that monitors do to a call."""
        call.output.register_hook(lambda gradient: None)
        compute_row_entropy(compute_row_logits(call, torch.arange(call.query.shape[2])))

    with Tap(model, look) as tap:
        tapped_logits, tapped_gradients = forward_and_gradients(model, batch)

    assert tap.calls == (6 if name == "t5" else 2)
    assert torch.equal(tapped_logits, logits)
    for parameter, gradient in gradients.items():
        if gradient is None:
            assert tapped_gradients[parameter] is None
        else:
            assert torch.equal(tapped_gradients[parameter], gradient), parameter


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_call_holds_what_the_output_projection_reads(attention: str) -> None:
    model = tiny_model("llama", attention)
    seen: list[torch.Tensor] = []
    read: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, x: read.append(x[0]))
    with Tap(model, lambda call: seen.append(call.output)):
        model(input_ids=tokens(2, 9))
    for output, projected in zip(seen, read, strict=True):
        assert output.shape == (2, 9, 4, 8)
        assert torch.equal(output.flatten(2), projected)


def test_generation_is_identical_with_the_tap_open() -> None:
    model = tiny_model("llama").eval()
    prompt = tokens(2, 6)
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(prompt, **options)
    with Tap(model, lambda call: None) as tap:
        got = model.generate(prompt, **options)
    assert torch.equal(got, expected)
    assert tap.calls == 2 * 5
