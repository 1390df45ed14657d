"""Importance equals what autograd says of explicit gates on the heads."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from surgery.callbacks import HeadImportance

from surgery.errors import TapError
from surgery.observe import AttentionCall, Tap
from tests.callbacks.fitting import Batch, OwnModule, by_layer, fit, padded, unpadded
from tests.callbacks.gates import gate_gradients, importance
from tests.tiny_models import tiny_model, tokens

MODELS = [
    ("llama", "sdpa"),
    ("llama", "eager"),
    ("gemma2", "eager"),
    ("gpt2", "sdpa"),
    ("bert", "sdpa"),
]


def seen_importance(
    module: OwnModule, batches: list[Batch], root: Path, **options: object
) -> torch.Tensor:
    """[layer, head] of the first step, through Lightning."""
    monitor = HeadImportance(every_n_steps=1, heatmap_every_n_steps=1)
    fit(module, batches, [monitor], root, **options)
    return torch.stack(by_layer(monitor.observations[0], "head_importance"))


@pytest.mark.parametrize("kind", ["unpadded", "padded"])
@pytest.mark.parametrize(("name", "attention"), MODELS)
def test_equals_explicit_gates(name: str, attention: str, kind: str, tmp_path: Path) -> None:
    ids = tokens(3, 10)
    batch = unpadded(ids) if kind == "unpadded" else padded(ids, 10, 4, 7)
    model = tiny_model(name, attention)
    expected = importance(model, batch)
    got = seen_importance(OwnModule(model), [batch], tmp_path)
    assert expected.min() > 0
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)


def test_is_the_mean_over_examples_of_each_ones_own_loss(tmp_path: Path) -> None:
    """Michel et al.'s definition, example by example: no sign cancels between examples."""
    ids = tokens(4, 10)
    model = tiny_model("llama")
    alone = [gate_gradients(model, unpadded(ids[i : i + 1]), 4) for i in range(4)]
    expected = torch.cat(alone, dim=1).abs().mean(1)
    got = seen_importance(OwnModule(model), [unpadded(ids)], tmp_path)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)


def test_gradient_accumulation(tmp_path: Path) -> None:
    batches = [padded(tokens(3, 10), 10, 4, 7), unpadded(tokens(2, 8, seed=1))]
    model = tiny_model("llama")
    expected = importance(model, *batches)
    got = seen_importance(OwnModule(model), batches, tmp_path, accumulate_grad_batches=2)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradient_checkpointing(name: str, reentrant: bool, tmp_path: Path) -> None:
    batch = padded(tokens(3, 10), 10, 4, 7)
    model = tiny_model(name)
    expected = importance(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = seen_importance(OwnModule(model), [batch], tmp_path)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)


def test_half_precision_weights(tmp_path: Path) -> None:
    batch = unpadded(tokens(3, 10))
    expected = importance(tiny_model("llama"), batch)
    model = tiny_model("llama").to(torch.bfloat16)
    got = seen_importance(OwnModule(model), [batch], tmp_path, precision="bf16-true")
    torch.testing.assert_close(got, expected, rtol=0.25, atol=0.05 * expected.max().item())


def test_layers_below_which_all_is_frozen_keep_their_number(tmp_path: Path) -> None:
    batch = unpadded(tokens(3, 10))
    model = tiny_model("llama")
    expected = importance(model, batch)
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    got = seen_importance(OwnModule(model), [batch], tmp_path)
    assert got[0].isnan().all()
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-7)


def test_a_model_through_which_no_gradient_flows_is_an_error(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    model.model.requires_grad_(False)  # only the language head learns
    with pytest.raises(TapError, match=r"head_importance: .* no gradient came back"):
        seen_importance(OwnModule(model), [unpadded(tokens(2, 6))], tmp_path)


def test_the_graph_of_a_step_is_freed_with_the_step() -> None:
    model = tiny_model("llama")
    monitor = HeadImportance(1, 1)
    outputs: list[weakref.ref[torch.Tensor]] = []

    def observe(call: AttentionCall) -> None:
        monitor.observe(call)
        outputs.append(weakref.ref(call.output))

    gc.collect()
    gc.disable()
    try:
        with Tap(model, observe):
            model(**unpadded(tokens(2, 6))).loss.backward()
        assert [output() for output in outputs] == [None, None]
    finally:
        gc.enable()
