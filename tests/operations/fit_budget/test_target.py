"""What a target means: bounds, and costs that are those of the plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from surgery.errors import ConfigError
from surgery.models.sites import find_sites
from surgery.operations.fit_budget.target import Scale, parse_target
from surgery.plan.make import make_plan
from surgery.plan.registry import find_operations, parse_operations
from tests.calibration.models import made

KEY = "attention.fit_budget.target"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, ("attention.fit_budget.target: ", "must say what the model may cost")),
        ({}, ("must say what the model may cost",)),
        ({"kv": 0.5}, ("attention.fit_budget.target.kv: unknown key", "kv_bytes")),
        ({"kv_bytes": 0}, ("attention.fit_budget.target.kv_bytes: must be above 0", "given: 0")),
        ({"kv_bytes": "half"}, ("must be above 0", "'half'")),
        ({"kv_bytes": True}, ("must be above 0",)),
        ({"memory": {"gib": 24}}, ("needs exactly gib, tokens, batch",)),
        ({"memory": {"gib": 24, "tokens": 1, "batch": -1}}, ("target.memory.batch",)),
        ({"loss": "little"}, ("attention.fit_budget.target.loss", "+1%")),
        ({"loss": "-1%"}, ("attention.fit_budget.target.loss",)),
    ],
)
def test_what_is_no_target(given: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_target(given, KEY)
    for word in words:
        assert word in str(refusal.value)


def test_losses_are_shares() -> None:
    assert parse_target({"loss": "+1%"}, KEY).loss == pytest.approx(0.01)
    assert parse_target({"loss": 0.05}, KEY).loss == 0.05


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "qwen3", "gpt_neox", "qwen2"])
def test_costs_are_those_of_the_plan(kind: str) -> None:
    """What is counted from heads alone, for the search, is what the plan then says."""
    model = made(kind, dtype=torch.float32)
    sites, tokens = find_sites(model).sites, 32
    whole = sum(parameter.numel() for parameter in model.parameters())
    names = {"kv_bytes": 1.0, "parameters": 1.0, "attention_flops": 1.0}
    bounds = parse_target(names, KEY).make_bounds(sites, Scale(tokens, 2, whole))
    seen = 0
    for name, found in find_operations().items():
        if found.searched is None:
            continue
        (operation,) = parse_operations({name: dict(found.searched)})
        for choice in operation.list_choices(sites[1]):
            try:
                plan = make_plan(
                    model, [operation.join_choices({1: choice})], tokens=tokens, kv_bytes=2
                )
            except ConfigError:  # of this architecture
                continue
            for bound in bounds:
                afters = [choice.after if site is sites[1] else site for site in sites]
                counted = bound.count_all(sites, afters)
                expected = getattr(plan.sizes_after, bound.name)
                if choice.after is None:  # norms inside the block go too
                    assert expected <= counted <= 1.01 * expected
                else:
                    assert counted == expected
                assert bound.most == getattr(plan.sizes_before, bound.name)
            seen += 1
    assert seen >= 8


def test_memory_is_weights_and_the_cache_of_a_batch() -> None:
    model = made("llama", dtype=torch.float32)
    sites, tokens, batch = find_sites(model).sites, 64, 3
    whole = sum(parameter.numel() for parameter in model.parameters())
    given = {"memory": {"gib": 1, "tokens": tokens, "batch": batch}}
    (bound,) = parse_target(given, KEY).make_bounds(sites, Scale(8, 2, whole))
    plan = make_plan(model, [], tokens=tokens, kv_bytes=2)
    assert bound.most == 2**30
    assert bound.count_all(sites, sites) == 2 * whole + batch * plan.sizes_before.kv_bytes
