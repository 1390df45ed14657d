"""`apply_` on the right model, on the wrong one, and on broken plans."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from surgery.errors import PlanError
from surgery.execute.live import apply_
from surgery.models.sites import find_sites
from surgery.plan.draft import Step
from surgery.plan.plan import Plan
from tests.families import family, logits, skeleton
from tests.operations.reference import gqa_plan

ARGUMENTS = {"axis": 0, "unit": 8, "parts": [[0, 1, 2, 3], [4, 5, 6, 7]], "merge": "mean"}


def state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def assert_untouched(model: PreTrainedModel, before: PreTrainedModel) -> None:
    old, new = before.state_dict(), model.state_dict()
    assert list(old) == list(new)
    assert all(torch.equal(old[key], new[key]) for key in old)
    assert model.config.to_dict() == before.config.to_dict()
    assert find_sites(model) == find_sites(before)
    assert torch.equal(logits(model), logits(before))


@pytest.mark.parametrize("name", ["llama", "olmo2", "stablelm", "minimax"])
def test_the_same_model_is_returned_and_is_the_plans_result(name: str) -> None:
    model = family(name)
    plan = gqa_plan(model, 2)
    assert apply_(model, plan) is model
    assert find_sites(model).sites == plan.after
    assert model.config.num_key_value_heads == 2


@pytest.mark.parametrize("options", [{}, {"layers": [1]}, {"merge": "random"}])
def test_twice_is_once(options: dict[str, object]) -> None:
    model = family("qwen2")
    plan = gqa_plan(model, 2, **options)
    apply_(model, plan)
    once = state(model)
    apply_(model, plan)
    assert all(torch.equal(once[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "olmo2", "qwen2", "falcon_h1"])
def test_the_meta_device_gives_the_same_structure(name: str) -> None:
    model = family(name)
    shell = skeleton(model)
    plan = gqa_plan(shell, 2, merge="random")
    apply_(shell, plan)
    apply_(model, plan)
    assert find_sites(shell) == find_sites(model)
    assert {k: t.shape for k, t in shell.state_dict().items()} == {
        k: t.shape for k, t in model.state_dict().items()
    }
    assert all(p.is_meta for p in shell.parameters())


def test_a_plan_that_was_written_down_does_the_same() -> None:
    one, two = family("qwen2"), family("qwen2")
    plan = gqa_plan(one, 2, merge="random")
    apply_(one, plan)
    apply_(two, Plan.from_json(plan.to_json()))
    assert torch.equal(logits(one), logits(two))


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 3},
        {"num_key_value_heads": 4},
        {"head_dim": 16},
        {"hidden_size": 128},
        {"attention_bias": True},
    ],
)
def test_another_model_is_refused_and_untouched(fields: dict[str, object]) -> None:
    plan = gqa_plan(family("llama"), 2)
    other = family("llama", **fields)
    before = copy.deepcopy(other)
    with pytest.raises(PlanError, match="is not the model the plan was made for"):
        apply_(other, plan)
    assert_untouched(other, before)


def test_another_architecture_is_refused() -> None:
    with pytest.raises(PlanError, match="this Qwen3ForCausalLM is not the model"):
        apply_(family("qwen3"), gqa_plan(family("llama"), 2))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"transform": "melt"}, "melt cannot be done"),
        ({"arguments": {"heads": 8}}, "combine_heads cannot be done"),
        ({"arguments": ARGUMENTS | {"parts": [[0, 8]]}}, "heads that do not exist: there are 8"),
        ({"arguments": ARGUMENTS | {"heads": 4}}, "8 heads, not 4"),
        ({"arguments": ARGUMENTS | {"unit": 7}}, "not a multiple of 7"),
        ({"arguments": ARGUMENTS | {"parts": [[0], [1], [2]]}}, "not what the plan says"),
        ({"arguments": ARGUMENTS | {"merge": "median"}}, "unknown merge"),
    ],
)
def test_a_plan_with_a_broken_edit_leaves_the_model_untouched(
    change: dict[str, object], said: str
) -> None:
    model = family("llama")
    before = copy.deepcopy(model)
    plan = gqa_plan(model, 2)
    last = plan.changes[-1]
    edits = (*last.edits[:-1], replace(last.edits[-1], **change))
    broken = replace(plan, changes=(*plan.changes[:-1], replace(last, edits=edits)))
    with pytest.raises(PlanError, match=said):
        apply_(model, broken)
    assert_untouched(model, before)


def test_a_plan_with_a_step_that_is_not_there_leaves_the_model_untouched() -> None:
    model = family("llama")
    before = copy.deepcopy(model)
    broken = replace(gqa_plan(model, 2), steps=(Step("gqa", "melt"),))
    with pytest.raises(PlanError, match="the step 'melt', which does not exist here"):
        apply_(model, broken)
    assert_untouched(model, before)


def test_what_is_frozen_stays_frozen_and_what_trains_trains() -> None:
    model = family("llama")
    model.model.layers[0].self_attn.k_proj.weight.requires_grad_(False)
    apply_(model, gqa_plan(model, 2))
    assert not model.model.layers[0].self_attn.k_proj.weight.requires_grad
    logits_of = model(input_ids=torch.arange(3, 9)[None], use_cache=False).logits
    logits_of.sum().backward()
    for name in ("q_proj", "v_proj", "o_proj"):
        assert getattr(model.model.layers[0].self_attn, name).weight.grad.any()
    assert model.model.layers[1].self_attn.k_proj.weight.grad.shape == (16, 64)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_every_module_is_kept(training: bool) -> None:
    model = family("llama").train(training)
    model.model.layers[0].mlp.train(not training)
    modes = [module.training for module in model.modules()]
    apply_(model, gqa_plan(model, 2))
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    model = family("qwen3", dtype=dtype)
    apply_(model, gqa_plan(model, 2))
    assert {tensor.dtype for tensor in model.parameters()} == {dtype}
    assert logits(model).isfinite().all()
