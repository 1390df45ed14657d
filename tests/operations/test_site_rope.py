"""Positions of single attention blocks of live models: hooks that hand them their own."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from surgery.errors import ConfigError, PlanError
from surgery.execute.live import apply_
from surgery.models.sites import find_sites
from surgery.operations.rope.site_rope import (
    SiteRope,
    has_site_rope,
    set_site_rope_,
    unset_site_rope_,
)
from surgery.plan.make import make_plan
from surgery.plan.registry import parse_operations
from tests.families import family, logits, skeleton, tokens
from tests.operations.rope_models import ROTARY_FAMILIES, decoded, draft_of, rope_, without_rotation


def paths(model: PreTrainedModel) -> list[str]:
    return [site.path for site in find_sites(model).sites]


@pytest.mark.parametrize("name", ROTARY_FAMILIES)
def test_nope_in_one_layer(name: str) -> None:
    model = family(name)
    with without_rotation(model, [1]):
        expected = logits(model)
    before = logits(model)
    rope_(model, type="none", layers=[1])
    assert torch.equal(logits(model), expected)
    assert not torch.allclose(expected, before)


@pytest.mark.parametrize("name", ROTARY_FAMILIES)
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
        set_site_rope_(apart, **one.arguments)
    assert torch.equal(logits(apart, ids), logits(whole, ids))


def test_blocks_go_back_to_the_models_own() -> None:
    model = family("llama")
    before = logits(model)
    set_site_rope_(model, dict.fromkeys(paths(model)))
    changed = logits(model)
    set_site_rope_(model, dict.fromkeys(paths(model)))
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
    set_site_rope_(model, **step.arguments)
    assert has_site_rope(model.get_submodule(paths(model)[0]))


def test_gradients_pass() -> None:
    model = rope_(family("llama"), type="none", layers=[0]).train()
    model.gradient_checkpointing_enable()
    loss = model(input_ids=tokens(), labels=tokens(), use_cache=False).loss
    loss.backward()
    weight = model.get_submodule(paths(model)[0]).q_proj.weight
    assert weight.grad is not None
    assert bool(weight.grad.any())


def test_a_change_of_the_config_that_would_not_reach_them_is_refused() -> None:
    operations = parse_operations({"rope": {"type": "linear", "factor": 2.0}})
    plan = make_plan(family("llama"), operations)
    model = rope_(family("llama"), type="none", layers=[0])
    before, config = logits(model), model.config.to_dict()
    with pytest.raises(ConfigError, match="positions of their own"):
        make_plan(model, operations)
    with pytest.raises(PlanError, match="positions of their own"):
        apply_(model, plan)
    assert torch.equal(logits(model), before)
    assert model.config.to_dict() == config


class _Own(nn.Module):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


def test_blocks_without_rotations_are_refused() -> None:
    model = family("llama")
    with pytest.raises(PlanError, match=r"has no model\.nothing"):
        set_site_rope_(model, {"model.nothing": None})
    model.model.layers[0].self_attn = _Own()
    with pytest.raises(PlanError, match="takes no position_embeddings"):
        set_site_rope_(model, {"model.layers.0.self_attn": None})


def test_positions_that_do_not_arrive_are_refused() -> None:
    model = rope_(family("llama"), type="linear", factor=2.0, layers=[0])
    block = model.get_submodule(paths(model)[0])
    hidden = torch.zeros(1, 3, 64, dtype=torch.float64)
    rotations = (torch.ones(1, 3, 8), torch.zeros(1, 3, 8))
    with pytest.raises(PlanError, match="no position_ids reach"):
        block(hidden, rotations, None)
    with pytest.raises(PlanError, match="no position_embeddings"):
        block(hidden)
