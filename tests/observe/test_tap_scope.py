"""What a tap sees, and what it leaves behind: one model's attention, and nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AttentionInterface

from surgery.errors import TapError
from surgery.observe import AttentionCall, Tap
from tests.tiny_models import tiny_model, tokens

ORIGINAL = AttentionInterface.get_interface


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> object:
    yield
    assert AttentionInterface.get_interface is ORIGINAL
    assert not Tap._open


def test_sites_are_the_module_paths_of_the_attention_blocks() -> None:
    model = tiny_model("gpt2")
    calls: list[AttentionCall] = []
    with Tap(model, calls.append):
        model(input_ids=tokens(1, 5))
    assert [call.site for call in calls] == ["transformer.h.0.attn", "transformer.h.1.attn"]
    assert all(model.get_submodule(call.site) is call.module for call in calls)


def test_a_closed_tap_sees_nothing() -> None:
    model = tiny_model("llama")
    tap = Tap(model, lambda call: None)
    model(input_ids=tokens(1, 5))
    tap.open()
    model(input_ids=tokens(1, 5))
    tap.close()
    model(input_ids=tokens(1, 5))
    assert tap.calls == 2
    tap.close()  # harmless


def test_another_model_is_not_observed() -> None:
    student, teacher = tiny_model("llama"), tiny_model("llama", seed=1)
    calls: list[AttentionCall] = []
    with Tap(student, calls.append) as tap:
        teacher(input_ids=tokens(1, 5))
        assert tap.calls == 0
        student(input_ids=tokens(1, 5))
    assert [call.module for call in calls] == [layer.self_attn for layer in student.model.layers]


def test_two_taps_see_the_same_calls_and_close_in_any_order() -> None:
    model = tiny_model("llama")
    first, second = Tap(model, lambda call: None), Tap(model, lambda call: None)
    first.open()
    second.open()
    model(input_ids=tokens(1, 5))
    first.close()
    assert AttentionInterface.get_interface is not ORIGINAL
    model(input_ids=tokens(1, 5))
    second.close()
    assert (first.calls, second.calls) == (2, 4)


def test_taps_may_be_nested() -> None:
    model = tiny_model("llama")
    with Tap(model, lambda call: None) as outer:
        with Tap(model, lambda call: None) as inner:
            model(input_ids=tokens(1, 5))
        model(input_ids=tokens(1, 5))
    assert (outer.calls, inner.calls) == (4, 2)


def test_opening_twice_observes_once() -> None:
    model = tiny_model("llama")
    tap = Tap(model, lambda call: None)
    tap.open()
    tap.open()
    model(input_ids=tokens(1, 5))
    tap.close()
    assert tap.calls == 2


def test_an_error_in_the_model_leaves_nothing_behind() -> None:
    model = tiny_model("llama")
    with pytest.raises(IndexError), Tap(model, lambda call: None):
        model(input_ids=torch.tensor([[10_000]]))


def test_an_error_in_the_observer_is_not_swallowed() -> None:
    def observe(call: AttentionCall) -> None:
        raise TapError("no")

    model = tiny_model("llama")
    with pytest.raises(TapError, match="no"), Tap(model, observe):
        model(input_ids=tokens(1, 5))


def test_attention_outside_the_interface_is_an_error() -> None:
    model = tiny_model("bloom", "eager")
    with Tap(model, lambda call: None) as tap:
        model(input_ids=tokens(1, 5))
    with pytest.raises(TapError, match="BloomForCausalLM was never called"):
        tap.require_calls()


def test_calls_are_required_every_time() -> None:
    """A compiled model may come by once, when it is traced, and never again."""
    model = tiny_model("llama")
    tap = Tap(model, lambda call: None)
    for _ in range(2):
        with tap:
            model(input_ids=tokens(1, 5))
        tap.require_calls()
    with tap:
        pass
    with pytest.raises(TapError, match="never called"):
        tap.require_calls()


def test_a_module_that_holds_a_model_can_be_tapped() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny_model("llama")

    holder = Holder()
    calls: list[AttentionCall] = []
    with Tap(holder, calls.append) as tap:
        holder.net(input_ids=tokens(1, 5))
    assert calls[0].site == "net.model.layers.0.self_attn"
    tap.require_calls()


def test_inference_mode_and_half_precision() -> None:
    model = tiny_model("llama").to(torch.bfloat16).eval()
    calls: list[AttentionCall] = []
    with torch.inference_mode(), Tap(model, calls.append):
        model(input_ids=tokens(1, 5))
    assert calls[0].query.dtype == torch.bfloat16
    assert not calls[0].output.requires_grad


def test_masks_of_queries_reach_encoder_and_decoder() -> None:
    model = tiny_model("t5")
    ids, targets = tokens(2, 7), tokens(2, 4)
    encoder_mask, decoder_mask = torch.ones_like(ids), torch.ones_like(targets)
    seen: dict[str, torch.Tensor | None] = {}
    tap = Tap(model, lambda call: seen.update({call.site: call.query_mask}))
    tap.open(encoder_mask, decoder_mask)
    model(input_ids=ids, attention_mask=encoder_mask, labels=targets)
    tap.close()
    assert len(seen) == 6
    for site, mask in seen.items():
        assert mask is (decoder_mask if site.startswith("decoder.") else encoder_mask)
