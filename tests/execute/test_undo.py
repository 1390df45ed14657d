"""What fails midway leaves no trace: every part of the model is what, and where, it was."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from surgery.errors import PlanError
from surgery.execute.live import apply_
from surgery.execute.undo import undoing_failure
from surgery.plan.draft import Step
from surgery.plan.make import make_plan
from surgery.plan.registry import parse_operations
from tests.families import family, logits

OPERATIONS: dict[str, dict[str, Any]] = {
    "gqa": {"gqa": {"kv_heads": 2}},
    "heads of one layer": {"prune_heads": {"heads": {0: [0, 1]}}},
    "all heads of a layer": {
        "prune_heads": {"heads": {1: list(range(8))}, "remove_attention": True}
    },
    "fuse_qkv": {"fuse_qkv": {}},
    "rope of one layer": {"rope": {"type": "none", "layers": [0]}},
    "rope": {"rope": {"type": "yarn", "factor": 2.0}},
    "backend": {"backend": {"implementation": "eager"}},
    "dropout": {"attention_dropout": {"p": 0.3}},
}


def describe(model: PreTrainedModel) -> list[Any]:
    """All that modules hold, parameters and buffers by identity, and the configs."""
    found: list[Any] = [model.config.to_dict(), model.generation_config.to_dict()]
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            held = dict(value) if isinstance(value, dict) else value
            if isinstance(held, dict):
                held = {key: id(one) for key, one in held.items()}
            elif not isinstance(held, (bool, int, float, str, tuple, type(None))):
                held = id(held)
            found.append((path, name, held))
    return found


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_result_that_is_not_the_plans_is_undone(name: str) -> None:
    model = family("llama")
    plan = make_plan(model, parse_operations(OPERATIONS[name]))
    wrong = replace(plan, after=tuple(replace(site, head_dim=99) for site in plan.after))
    held, before = describe(model), logits(model)
    with pytest.raises(PlanError, match="is not what the plan predicted"):
        apply_(model, wrong)
    assert describe(model) == held
    assert torch.equal(logits(model), before)
    result = apply_(model, plan)
    assert describe(result) != held


def test_a_step_that_fails_is_undone() -> None:
    model = family("llama")
    plan = make_plan(model, parse_operations({"gqa": {"kv_heads": 2}}))
    places = {role: f"model.layers.0.self_attn.{role[0]}_proj" for role in ("query", "key")}
    step = Step("fuse_qkv", "fuse_qkv", {"sites": [{"path": "no.such.block", **places}]})
    held = describe(model)
    with pytest.raises((PlanError, KeyError, AttributeError)):
        apply_(model, replace(plan, steps=(*plan.steps, step)))
    assert describe(model) == held


def test_an_interruption_is_undone_and_hooks_can_still_be_removed() -> None:
    model = family("llama")
    block = model.model.layers[0].self_attn
    handle = block.register_forward_hook(lambda *_: None)
    held = describe(model)

    def interrupted() -> None:
        with undoing_failure(model):
            block.register_forward_pre_hook(lambda *_: None)
            block.q_proj = nn.Identity()
            block.k_proj.weight = nn.Parameter(torch.zeros(1))
            block.register_buffer("extra", torch.zeros(1))
            model.config.rope_parameters["rope_theta"] = 5.0
            model.config.extra = [1]
            del model.lm_head
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert describe(model) == held
    handle.remove()
    assert not block._forward_hooks


def test_what_succeeds_stays() -> None:
    model = family("llama")
    before = copy.deepcopy(model.config.to_dict())
    with undoing_failure(model):
        model.config.extra = 1
    assert model.config.to_dict() == before | {"extra": 1}
