"""Heads that differ only by what the model cannot see are merged without loss, end to end."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from surgery.calibration import Calibration
from surgery.execute.live import apply_
from surgery.models.sites import find_sites
from surgery.plan.plan import Plan
from tests.calibration.models import KINDS, batches, made, plan_for, unseen
from tests.calibration.rewriting import Groups, Heads, Turning, rewrite_, rewrite_head_
from tests.families import family, logits, masked_lm, tokens

HALVES = [(0, 1, 2, 3), (4, 5, 6, 7)]
PAIRS = [(0, 1), (2, 3), (4, 5), (6, 7)]
MIXED_HALVES = [(0, 2, 5, 7), (1, 3, 4, 6)]
MIXED_PAIRS = [(0, 5), (1, 6), (2, 7), (3, 4)]
ALL = [tuple(range(8))]


def assert_same(actual: Tensor, expected: Tensor, share: float = 1e-5) -> None:
    atol = share * float(expected.abs().max())
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=atol)


def found_groups(plan: Plan) -> list[list[tuple[int, ...]]]:
    assert plan.calibration is not None
    sites = plan.calibration["operations"][0]["sites"].values()
    return [[tuple(group) for group in site["groups"]] for site in sites]


@pytest.mark.parametrize("name", KINDS)
def test_the_rewriting_itself_changes_nothing(name: str) -> None:
    model = made(name)
    before = logits(model, unseen())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for site in find_sites(model).sites:
            for head in range(site.kv_heads):
                rewrite_head_(Heads(model, site), head, KINDS[name][2], generator)
    assert_same(logits(model, unseen()), before, 1e-6)


MERGED = [name for name in KINDS if name not in ("gpt_neox", "opt")]  # these take no shared heads


@pytest.mark.parametrize("name", MERGED)
def test_neighbours_that_are_alike_merge_without_loss(name: str) -> None:
    model = rewrite_(made(name, dtype=torch.float32), HALVES, KINDS[name][2])
    before = logits(model, unseen())
    plan = plan_for(model, kv_heads=2, merge="optimal")
    apply_(model, plan)
    assert {site.kv_heads for site in plan.after} == {2}
    assert_same(logits(model, unseen()), before)


@pytest.mark.parametrize("name", MERGED)
def test_heads_that_are_alike_find_each_other(name: str) -> None:
    groups = MIXED_HALVES if len(name) % 2 else MIXED_PAIRS
    model = rewrite_(made(name, dtype=torch.float32), groups, KINDS[name][2])
    before = logits(model, unseen())
    options = Calibration(refine_steps=3, keep_batches=2)
    plan = plan_for(
        model, None, options, kv_heads=len(groups), merge="optimal", grouping="similarity"
    )
    assert found_groups(plan) == [sorted(groups)] * 2
    apply_(model, plan)
    assert_same(logits(model, unseen()), before)


@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize(("kv_heads", "groups"), [(1, ALL), (4, PAIRS)])
def test_with_and_without_a_refit(refit: bool, kv_heads: int, groups: Groups) -> None:
    model = rewrite_(made("llama"), groups, KINDS["llama"][2])
    before = logits(model, unseen())
    options = Calibration(refine_steps=0, refit=refit)
    apply_(model, plan_for(model, None, options, kv_heads=kv_heads, merge="optimal"))
    assert_same(logits(model, unseen()), before, 1e-6)


def test_counts_that_differ_between_layers() -> None:
    model = made("qwen2", num_hidden_layers=3)
    rewrite_(model, [MIXED_HALVES, PAIRS, ALL], KINDS["qwen2"][2])
    before = logits(model, unseen())
    plan = plan_for(model, kv_heads=[2, 4, 1], merge="optimal", grouping="similarity")
    assert found_groups(plan) == [sorted(MIXED_HALVES), PAIRS, ALL]
    apply_(model, plan)
    assert [site.kv_heads for site in find_sites(model).sites] == [2, 4, 1]
    assert_same(logits(model, unseen()), before)


def test_only_the_chosen_layers_change() -> None:
    model = made("llama", num_hidden_layers=3)
    site = find_sites(model).sites[1]
    rewrite_(model, HALVES, KINDS["llama"][2], sites=[site])
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    before = logits(model, unseen())
    apply_(model, plan_for(model, kv_heads=2, merge="optimal", layers=[1]))
    for key, tensor in model.state_dict().items():
        assert key.startswith(site.path) or torch.equal(tensor, weights[key]), key
    assert_same(logits(model, unseen()), before)


def test_values_alone_when_keys_are_the_same_already() -> None:
    model = rewrite_(made("llama"), HALVES, Turning("half", 8))
    with torch.no_grad():
        for site in find_sites(model).sites:
            heads = Heads(model, site)
            for group in HALVES:
                for head in group:
                    heads.copy_("key", group[0], head)
    before = logits(model, unseen())
    apply_(model, plan_for(model, kv_heads=2, merge="optimal"))
    assert_same(logits(model, unseen()), before)


@pytest.mark.parametrize("merge", ["aligned", "aligned_renorm"])
def test_aligning_undoes_rotations(merge: str) -> None:
    """Its freedom is smaller: planes and values turned, neither stretched."""
    model = made("llama")
    rewrite_(model, HALVES, Turning("half", 8, pure=True), stretch=False)
    before = logits(model, unseen())
    apply_(model, plan_for(model, kv_heads=2, merge=merge))
    assert_same(logits(model, unseen()), before)


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_half_precision(dtype: torch.dtype, share: float) -> None:
    """As near as the rounding of weights and activations lets it come."""
    model = rewrite_(made("llama"), MIXED_HALVES, Turning("half", 8)).to(dtype)
    before = logits(model, unseen()).float()
    by_mean = copy.deepcopy(model)
    plan = plan_for(model, kv_heads=2, merge="optimal", grouping="similarity")
    assert found_groups(plan) == [sorted(MIXED_HALVES)] * 2
    apply_(model, plan)
    assert {p.dtype for p in model.parameters()} == {dtype}

    def off(one: torch.nn.Module) -> float:
        return float((logits(one, unseen()).float() - before).norm() / before.norm())

    apply_(by_mean, plan_for(by_mean, kv_heads=2, merge="mean"))
    assert off(model) < share
    assert off(model) < off(by_mean) / 5


def test_an_encoder_with_padding() -> None:
    model = rewrite_(masked_lm("bert", num_hidden_layers=2), MIXED_PAIRS, Turning())
    ids, mask = tokens(4, 16), torch.ones(4, 16, dtype=torch.long)
    mask[1, 9:], mask[2, 3:] = 0, 0
    data = [{"input_ids": ids, "attention_mask": mask, "labels": ids}, *batches(3)]
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits
    plan = plan_for(model, data, kv_heads=4, merge="optimal", grouping="similarity")
    assert found_groups(plan) == [sorted(MIXED_PAIRS)] * 2
    apply_(model, plan)
    with torch.no_grad():
        after = model(input_ids=ids, attention_mask=mask).logits
    assert_same(after[mask.bool()], before[mask.bool()])


def test_a_plain_merge_in_the_groups_that_were_found() -> None:
    """Heads that are equal outright: their mean loses nothing, wherever they lie."""
    model = made("llama")
    with torch.no_grad():
        for site in find_sites(model).sites:
            heads = Heads(model, site)
            for group in MIXED_PAIRS:
                for role in ("key", "value"):
                    heads.copy_(role, group[0], group[1])
    before = logits(model, unseen())
    plan = plan_for(model, kv_heads=4, merge="mean", grouping="similarity")
    assert found_groups(plan) == [sorted(MIXED_PAIRS)] * 2
    assert plan.resolved == {}
    apply_(model, plan)
    assert_same(logits(model, unseen()), before)


def test_heads_wider_than_the_model_are_refined_too() -> None:
    """Their values span less than they have features; no coefficient may grow without bound."""
    model = family("gemma3", dtype=torch.float32)
    plan = plan_for(model, None, Calibration(refine_steps=20), kv_heads=2, merge="optimal")
    assert plan.calibration is not None
    for site in plan.calibration["operations"][0]["sites"].values():
        assert site["output_refined"] < 0.95 * site["output_closed_form"]  # on held-out text
    assert max(float(tensor.abs().max()) for tensor in plan.tensors.values()) < 100
    by_mean = copy.deepcopy(model)
    before = logits(model, unseen())
    apply_(model, plan)
    apply_(by_mean, plan_for(by_mean, kv_heads=2, merge="mean"))
    off = [float((logits(one, unseen()) - before).norm()) for one in (model, by_mean)]
    assert off[0] < off[1]
