"""What a merge must compute, against models that were rewritten head by head."""

from __future__ import annotations

import copy

import pytest
import torch

from surgery.execute.live import apply_
from surgery.models.sites import find_sites
from tests.families import HEADS, SEPARATE, family, logits
from tests.operations.reference import attention_modules, gqa_plan, kv_tensors, share_by_hand_


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """To 1e-6 of the largest logit: norms and routers compute in fp32 whatever the weights."""
    atol = 1e-6 * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def head_dim_of(model: torch.nn.Module) -> int:
    return attention_modules(model)[0].q_proj.out_features // HEADS


@pytest.mark.parametrize("name", SEPARATE)
@pytest.mark.parametrize("merge", ["mean", "first"])
def test_a_merged_model_equals_the_original_with_its_heads_rewritten(name: str, merge: str) -> None:
    model = family(name)
    by_hand = copy.deepcopy(model)
    share_by_hand_(by_hand, kv_heads=HEADS, groups=2, head_dim=head_dim_of(model), merge=merge)
    before = logits(model)
    expected = logits(by_hand)
    apply_(model, gqa_plan(model, 2, merge=merge))
    assert_same(logits(model), expected)
    assert (expected - before).abs().max() > 1e-3  # else the comparison would show nothing


@pytest.mark.parametrize("name", SEPARATE)
def test_merging_equal_heads_changes_nothing(name: str) -> None:
    model = family(name)
    share_by_hand_(model, kv_heads=HEADS, groups=4, head_dim=head_dim_of(model), merge="first")
    before = logits(model)
    apply_(model, gqa_plan(model, 4))
    assert_same(logits(model), before)


@pytest.mark.parametrize("name", SEPARATE)
def test_as_many_heads_as_before_is_the_identity_to_the_bit(name: str) -> None:
    model = family(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    plan = gqa_plan(model, HEADS)
    assert plan.edits == []
    assert plan.config_patch == {}
    apply_(model, plan)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("name", ["llama_biased", "olmo2", "qwen3", "stablelm"])
@pytest.mark.parametrize("groups", [2, 1])
def test_a_model_that_shares_heads_already_can_share_more(name: str, groups: int) -> None:
    model = family(name, num_key_value_heads=4)
    by_hand = copy.deepcopy(model)
    share_by_hand_(by_hand, kv_heads=4, groups=groups, head_dim=head_dim_of(model))
    apply_(model, gqa_plan(model, groups))
    assert_same(logits(model), logits(by_hand))


@pytest.mark.parametrize("name", ["llama_biased", "olmo2", "gemma3", "stablelm", "falcon_h1"])
def test_chosen_layers_change_and_the_others_stay(name: str) -> None:
    model = family(name, num_hidden_layers=3)
    by_hand = copy.deepcopy(model)
    share_by_hand_(by_hand, kv_heads=HEADS, groups=2, head_dim=head_dim_of(model), layers=[0, 2])
    plan = gqa_plan(model, 2, layers=[2, 0, 2])
    apply_(model, plan)
    assert [site.kv_heads for site in plan.after] == [2, HEADS, 2]
    assert_same(logits(model), logits(by_hand))


@pytest.mark.parametrize("name", ["qwen2", "olmo2"])
def test_two_steps_of_means_are_one(name: str) -> None:
    direct, stepwise = family(name), family(name)
    apply_(direct, gqa_plan(direct, 2))
    for kv_heads in (4, 2):
        apply_(stepwise, gqa_plan(stepwise, kv_heads))
    for key, tensor in direct.state_dict().items():
        torch.testing.assert_close(stepwise.state_dict()[key], tensor, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_means_are_rounded_once_whatever_the_weights_are_stored_in(dtype: torch.dtype) -> None:
    model = family("qwen2", dtype=dtype)
    sources = [
        [tensor.detach().double() for tensor in kv_tensors(module, 8, HEADS)]
        for module in attention_modules(model)
    ]
    apply_(model, gqa_plan(model, 2))
    for module, originals in zip(attention_modules(model), sources, strict=True):
        for tensor, original in zip(kv_tensors(module, 8, 2), originals, strict=True):
            mean = torch.stack([original.view(2, 4, 8, -1)[:, i] for i in range(4)]).mean(0)
            assert tensor.dtype == dtype
            # Half a unit in the last place, and the fp32 sum of four terms.
            bound = mean.abs() * (torch.finfo(dtype).eps + 4 * torch.finfo(torch.float32).eps)
            if dtype == torch.float64:
                bound = mean.abs() * 8 * torch.finfo(dtype).eps + 1e-17
            bound = bound + 4e-7 * (dtype != torch.float64)
            assert ((tensor.double().view_as(mean) - mean).abs() <= bound).all()


class TestRandom:
    def operated(self, seed: int) -> dict[str, torch.Tensor]:
        model = family("qwen2", hidden_size=256, initializer_range=0.05)
        apply_(model, gqa_plan(model, 2, seed=seed, merge="random"))
        return {k: v for k, v in model.state_dict().items() if "k_proj" in k or "v_proj" in k}

    def test_the_same_plan_draws_the_same_bits(self) -> None:
        one, two = self.operated(0), self.operated(0)
        assert all(torch.equal(one[key], two[key]) for key in one)

    def test_another_seed_draws_others(self) -> None:
        one, two = self.operated(0), self.operated(1)
        assert not any(torch.equal(one[k], two[k]) for k in one if k.endswith("weight"))

    def test_no_two_tensors_are_drawn_alike(self) -> None:
        drawn = [t for key, t in self.operated(0).items() if key.endswith("weight")]
        assert len({tensor.sum().item() for tensor in drawn}) == len(drawn) == 4

    def test_weights_are_spread_as_the_architecture_initialises_and_biases_are_zero(self) -> None:
        drawn = self.operated(0)
        weights = torch.cat([t.flatten() for key, t in drawn.items() if key.endswith("weight")])
        count = weights.numel()
        assert abs(weights.mean()) < 5 * 0.05 / count**0.5
        assert abs(weights.std() / 0.05 - 1) < 5 / (2 * count) ** 0.5
        assert all(not t.any() for key, t in drawn.items() if key.endswith("bias"))

    def test_a_norm_over_all_heads_takes_means_since_a_gain_is_not_drawn(self) -> None:
        model, averaged = family("olmo2"), family("olmo2")
        apply_(model, gqa_plan(model, 2, merge="random"))
        apply_(averaged, gqa_plan(averaged, 2, merge="mean"))
        for one, two in zip(attention_modules(model), attention_modules(averaged), strict=True):
            assert torch.equal(one.k_norm.weight, two.k_norm.weight)
            assert not torch.equal(one.k_proj.weight, two.k_proj.weight)


def test_query_heads_and_outputs_are_untouched() -> None:
    model = family("qwen3")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    apply_(model, gqa_plan(model, 1))
    after = model.state_dict()
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert changed == {
        f"model.layers.{layer}.self_attn.{name}.weight"
        for layer in range(2)
        for name in ("k_proj", "v_proj")
    }
    assert [site.kv_heads for site in find_sites(model).sites] == [1, 1]
