"""`fuse_qkv` in a plan: which sites it names, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from surgery.errors import ConfigError
from surgery.models.convert import convert_model
from surgery.models.sites import find_sites
from surgery.operations.fuse_qkv.projections import is_fused, unfuse_qkv_
from surgery.plan.draft import Draft
from surgery.plan.registry import parse_operations, run_step
from tests.families import SEPARATE, family, logits, skeleton
from tests.models.convert.moving import model_of
from tests.operations.drafts import drafted


def plan(model, draft: Draft | None = None, **options) -> Draft:
    draft = drafted(model) if draft is None else draft
    (operation,) = parse_operations({"fuse_qkv": options})
    draft.name = operation.name
    operation.plan(draft)
    return draft


@pytest.mark.parametrize("name", SEPARATE)
def test_what_it_plans_can_be_done_and_undone(name: str) -> None:
    model = family(name)
    expected, anatomy = logits(model), find_sites(model)
    (step,) = plan(skeleton(model)).steps
    assert (step.operation, step.recorded) == ("fuse_qkv", False)
    run_step(step.kind, model, step.arguments)
    assert is_fused(model)
    assert find_sites(model) == anatomy  # the parts read as projections
    assert float((logits(model) - expected).norm() / expected.norm()) <= 1e-12
    unfuse_qkv_(model)
    assert torch.equal(logits(model), expected)


def test_chosen_layers_only() -> None:
    (step,) = plan(family("llama"), layers=[1]).steps
    assert [site["path"] for site in step.arguments["sites"]] == ["model.layers.1.self_attn"]


def test_sites_that_are_fused_already_are_noted() -> None:
    for options in ({}, {"keep": True}):
        draft = plan(convert_model(skeleton(model_of("llama")), "phi3"), **options)
        assert not draft.steps
        assert draft.notes == ["fuse_qkv: layers 0, 1 of this Phi3ForCausalLM are fused already"]


def test_keeping_needs_an_architecture_that_can() -> None:
    with pytest.raises(ConfigError, match=r"keep: a LlamaForCausalLM(.|\n)*\(phi3\)"):
        plan(family("llama"), keep=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: replace(s, cross=True), "from elsewhere"),
        (lambda s: replace(s, key=replace(s.key, in_features=7)), "from elsewhere"),
        (lambda s: replace(s, value=replace(s.value, bias=True)), "have a bias"),
        (lambda s: replace(s, key=replace(s.key, transposed=True)), "not Linears"),
        (lambda s: replace(s, key=replace(s.key, path="other.k_proj")), "different modules"),
    ],
    ids=["cross", "width", "bias", "conv1d", "places"],
)
def test_sites_that_cannot_be_fused(change, message) -> None:
    model = family("llama")
    draft = drafted(model)
    draft.sites[1] = change(draft.sites[1])
    with pytest.raises(ConfigError, match=message):
        plan(model, draft, layers=[1])
    plan(model, draft, layers=[0])


def test_cross_attention_is_left_apart_unless_it_is_named() -> None:
    model = family("llama")
    draft = drafted(model)
    draft.sites[1] = replace(draft.sites[1], cross=True)
    plan(model, draft)
    assert [site["path"] for site in draft.steps[0].arguments["sites"]] == [draft.sites[0].path]
    assert "1 cross-attention blocks keep separate projections" in draft.notes[0]
