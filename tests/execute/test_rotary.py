"""Positions of live models: rebuilt rotary modules, and hooks on single attention blocks."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from surgery.execute.rotary import rebuild_rotary
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from surgery.errors import PlanError
from surgery.models.sites import find_sites
from surgery.operations.rope.site_rope import SiteRope, has_site_rope, site_rope, unset_site_rope_
from tests.families import family, logits, skeleton, tokens
from tests.operations.rope_models import draft_of, rope_, without_rotation

FAMILIES = [
    "llama",
    "cohere",
    "gemma2",
    "gemma3",
    "glm4",
    "gpt_oss",
    "granite",
    "mistral",
    "mixtral",
    "olmo2",
    "phi",
    "qwen3",
    "stablelm",
    "starcoder2",
]
YARN = {"type": "yarn", "factor": 2.0}


def rotary(model: PreTrainedModel) -> Any:
    return model.model.rotary_emb


def paths(model: PreTrainedModel) -> list[str]:
    return [site.path for site in find_sites(model).sites]


@torch.no_grad()
def decoded(model: PreTrainedModel, ids: torch.Tensor, prefix: int) -> torch.Tensor:
    """Logits of `ids`, the last ones token by token with a cache."""
    first = model(input_ids=ids[:, :prefix], use_cache=True)
    parts, cache = [first.logits], first.past_key_values
    for i in range(prefix, ids.shape[1]):
        step = model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        parts.append(step.logits)
    return torch.cat(parts, dim=1)


# The whole model


def test_editing_the_config_alone_changes_nothing_and_the_step_does() -> None:
    model = family("llama")
    before = logits(model)
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 77.0}
    assert torch.equal(logits(model), before)
    rebuild_rotary(model)
    assert not torch.allclose(logits(model), before)


@pytest.mark.parametrize("name", FAMILIES)
def test_rebuilding_an_unchanged_model_changes_no_bit(name: str) -> None:
    model = family(name)
    before = logits(model)
    rebuild_rotary(model)
    rebuild_rotary(model)
    assert torch.equal(logits(model), before)


def test_frequencies_stay_fp32_in_a_bf16_model() -> None:
    model = family("llama").to(torch.bfloat16)
    assert rotary(model).inv_freq.dtype is torch.bfloat16  # what `.to` does to them
    rope_(model, **YARN)
    assert rotary(model).inv_freq.dtype is torch.float32
    exact = rotary(rope_(family("llama", dtype=torch.float32), **YARN)).inv_freq
    assert torch.equal(rotary(model).inv_freq, exact)


def test_modules_keep_their_identity_and_hooks() -> None:
    model = family("llama")
    module, calls = rotary(model), []
    module.register_forward_hook(lambda *_: calls.append(1))
    rope_(model, **YARN)
    assert rotary(model) is module
    logits(model)
    assert calls == [1]
    assert module.rope_type == "yarn"


def test_state_of_a_dynamic_type_does_not_stay() -> None:
    model = rope_(family("llama"), type="dynamic", factor=2.0)
    logits(model, tokens(1, 100))  # grows the frequencies
    rope_(model, type="default")
    assert torch.equal(logits(model), logits(family("llama")))


def test_on_the_meta_device() -> None:
    model = skeleton(family("llama"))
    model.config.rope_parameters = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    rebuild_rotary(model)
    assert rotary(model).rope_type == "linear"
    assert rotary(model).inv_freq.is_meta


def test_training_mode_stays() -> None:
    model = family("llama").train()
    rope_(model, **YARN)
    assert all(module.training for module in model.modules())


def test_a_model_without_rotary_modules_is_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(PlanError, match="no rotary embedding"):
        rebuild_rotary(model)


@pytest.mark.parametrize("name", ["llama", "gemma3", "glm4", "mixtral"])
@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3", "none"])
def test_decoding_with_a_cache(name: str, kind: str) -> None:
    model = family(name)
    rope_(model, type=kind, **({} if kind == "none" else {"factor": 2.0}))
    ids = tokens(2, 12)
    torch.testing.assert_close(decoded(model, ids, 5), logits(model, ids), atol=1e-6, rtol=1e-6)


# Single blocks


@pytest.mark.parametrize("name", FAMILIES)
def test_nope_in_one_layer(name: str) -> None:
    model = family(name)
    with without_rotation(model, [1]):
        expected = logits(model)
    before = logits(model)
    rope_(model, type="none", layers=[1])
    assert torch.equal(logits(model), expected)
    assert not torch.allclose(expected, before)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3", "dynamic"])
def test_each_layer_alone_is_all_at_once(name: str, kind: str) -> None:
    if (name, kind) == ("stablelm", "dynamic"):
        pytest.skip("refused: only two dimensions rotate")
    ids = tokens(2, 90)
    apart = family(name)
    whole = rope_(copy.deepcopy(apart), type=kind, factor=2.0)
    draft = draft_of(apart, type=kind, factor=2.0, layers=[1])
    (step,) = draft.steps
    assert step.kind == "site_rope"
    assert step.recorded
    # The plan for one layer, done to every layer.
    steps = [draft_of(apart, type=kind, factor=2.0, layers=[n]).steps[0] for n in (0, 1)]
    for one in steps:
        site_rope(apart, **one.arguments)
    assert torch.equal(logits(apart, ids), logits(whole, ids))


def test_blocks_go_back_to_the_models_own() -> None:
    model = family("llama")
    before = logits(model)
    site_rope(model, dict.fromkeys(paths(model)))
    changed = logits(model)
    site_rope(model, dict.fromkeys(paths(model)))
    assert (
        sum(isinstance(h, SiteRope) for m in model.modules() for h in m._forward_pre_hooks.values())
        == 2
    )
    assert torch.equal(logits(model), changed)
    unset_site_rope_(model, paths(model)[0])
    assert not has_site_rope(model.get_submodule(paths(model)[0]))
    unset_site_rope_(model)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("options", [{"type": "none"}, {"type": "linear", "factor": 2.0}])
@pytest.mark.parametrize("name", ["llama", "gemma3", "phi"])
def test_blocks_with_a_cache_and_padding(name: str, options: dict[str, Any]) -> None:
    model = rope_(family(name), **options, layers=[0])
    ids = tokens(2, 12)
    torch.testing.assert_close(decoded(model, ids, 5), logits(model, ids), atol=1e-6, rtol=1e-6)

    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(ids)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        out = model(input_ids=padded, attention_mask=mask, position_ids=positions, use_cache=False)
    torch.testing.assert_close(out.logits[:, 3:], logits(model, ids), atol=1e-6, rtol=1e-6)

    plain = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    left = model.generate(
        padded, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False
    )
    assert torch.equal(plain, left[:, 3:])


def test_blocks_of_copies_and_pickles() -> None:
    model = rope_(family("llama"), type="linear", factor=2.0, layers=[0])
    expected = logits(model)
    copied = copy.deepcopy(model)
    unset_site_rope_(model)
    assert torch.equal(logits(copied), expected)
    buffer = io.BytesIO()
    torch.save(copied, buffer)
    buffer.seek(0)
    assert torch.equal(logits(torch.load(buffer, weights_only=False)), expected)


def test_blocks_of_a_bf16_model_have_fp32_frequencies() -> None:
    model = rope_(family("llama"), type="linear", factor=2.0, layers=[0]).to(torch.bfloat16)
    hooks = model.get_submodule(paths(model)[0])._forward_pre_hooks.values()
    (hook,) = [hook for hook in hooks if isinstance(hook, SiteRope)]
    assert hook.rotary is not None
    assert hook.rotary.inv_freq.dtype is torch.float32
    assert logits(model).dtype is torch.bfloat16
    with torch.no_grad():
        model(input_ids=tokens(), use_cache=False)
    assert hook.rotary.inv_freq.dtype is torch.float32


def test_blocks_on_the_meta_device() -> None:
    live = family("llama")
    model = skeleton(live)
    (step,) = draft_of(live, type="yarn", factor=2.0, layers=[0]).steps
    site_rope(model, **step.arguments)
    assert has_site_rope(model.get_submodule(paths(model)[0]))


def test_gradients_pass() -> None:
    model = rope_(family("llama"), type="none", layers=[0]).train()
    model.gradient_checkpointing_enable()
    loss = model(input_ids=tokens(), labels=tokens(), use_cache=False).loss
    loss.backward()
    weight = model.get_submodule(paths(model)[0]).q_proj.weight
    assert weight.grad is not None
    assert bool(weight.grad.any())


def test_a_hidden_change_is_refused() -> None:
    model = rope_(family("llama"), type="none", layers=[0])
    with pytest.raises(PlanError, match="positions of their own"):
        rebuild_rotary(model)


class _Own(nn.Module):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


def test_blocks_without_rotations_are_refused() -> None:
    model = family("llama")
    with pytest.raises(PlanError, match=r"has no model\.nothing"):
        site_rope(model, {"model.nothing": None})
    model.model.layers[0].self_attn = _Own()
    with pytest.raises(PlanError, match="takes no position_embeddings"):
        site_rope(model, {"model.layers.0.self_attn": None})


def test_positions_that_do_not_arrive_are_refused() -> None:
    model = rope_(family("llama"), type="linear", factor=2.0, layers=[0])
    block = model.get_submodule(paths(model)[0])
    hidden = torch.zeros(1, 3, 64, dtype=torch.float64)
    rotations = (torch.ones(1, 3, 8), torch.zeros(1, 3, 8))
    with pytest.raises(PlanError, match="no position_ids reach"):
        block(hidden, rotations, None)
    with pytest.raises(PlanError, match="no position_embeddings"):
        block(hidden)
