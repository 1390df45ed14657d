"""`gqa` among other operations: calibrated on the model as the earlier ones leave it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from surgery.execute.live import apply_
from surgery.models.sites import find_sites
from tests.calibration.models import KINDS, batches, made, plan_for, unseen
from tests.calibration.rewriting import Turning, rewrite_
from tests.families import logits

GQA = {"kv_heads": 4, "merge": "optimal", "grouping": "similarity"}
MIXED_PAIRS = [(0, 5), (1, 6), (2, 7), (3, 4)]


def assert_same(model: Any, expected: torch.Tensor) -> None:
    atol = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(logits(model, unseen()), expected, rtol=0, atol=atol)


CHAINS: dict[str, dict[str, Any]] = {
    "rope": {"rope": {"type": "linear", "factor": 2.0}},
    "rehouse": {"rehouse": {"into": "mistral"}},
    "backend": {"backend": {"implementation": "eager"}},
    "fuse_qkv": {"fuse_qkv": {}},
    "attention_dropout": {"attention_dropout": {"p": 0.3}},
}


@pytest.mark.parametrize("name", CHAINS)
def test_what_comes_first_is_in_the_model_that_is_looked_at(name: str) -> None:
    model = made("llama" if name != "rehouse" else "llama_yarn", dtype=torch.float64)
    rewrite_(model, MIXED_PAIRS, KINDS["llama"][2])
    before_alone = copy.deepcopy(model)
    alone = plan_for(before_alone, batches(1), operations=CHAINS[name])
    expected = logits(apply_(before_alone, alone).eval(), unseen())
    plan = plan_for(model, operations=CHAINS[name] | {"gqa": GQA})
    model = apply_(model, plan)
    assert {site.kv_heads for site in find_sites(model).sites if name != "fuse_qkv"} <= {4}
    assert_same(model.eval(), expected)


def test_fusing_afterwards() -> None:
    model = rewrite_(made("llama"), MIXED_PAIRS, KINDS["llama"][2])
    expected = logits(model, unseen())
    model = apply_(model, plan_for(model, operations={"gqa": GQA, "fuse_qkv": {}}))
    assert_same(model, expected)


def test_after_heads_and_whole_layers_are_gone() -> None:
    prune = {"heads": {0: [1, 6], 1: list(range(8))}, "remove_attention": True}
    model = made("llama", num_hidden_layers=3)
    # Pairs among those that stay: 0 2 3 4 5 7 become 0 … 5 in layer 0.
    sites = find_sites(model).sites
    rewrite_(
        model,
        [[(0, 3), (2, 7), (4, 5)], MIXED_PAIRS],
        Turning("half", 8),
        sites=[sites[0], sites[2]],
    )
    pruned = copy.deepcopy(model)
    pruned = apply_(pruned, plan_for(pruned, operations={"prune_heads": prune}))
    expected = logits(pruned, unseen())
    operations = {"prune_heads": prune, "gqa": GQA | {"kv_heads": [3, 4], "layers": [0, 2]}}
    plan = plan_for(model, operations=operations)
    assert plan.calibration is not None
    groups = [site["groups"] for site in plan.calibration["operations"][0]["sites"].values()]
    assert groups == [[[0, 2], [1, 5], [3, 4]], [list(pair) for pair in sorted(MIXED_PAIRS)]]
    assert_same(apply_(model, plan), expected)


def test_twice_is_calibrated_twice() -> None:
    model = rewrite_(made("llama"), [tuple(range(8))], KINDS["llama"][2])
    expected = logits(model, unseen())
    first = plan_for(model, kv_heads=4, merge="optimal")
    model = apply_(model, first)
    second = plan_for(model, kv_heads=1, merge="optimal", grouping="similarity")
    assert_same(apply_(model, second), expected)


def test_an_earlier_operation_draws_from_the_plans_seed() -> None:
    """The model that is looked at is the one that the plan makes, drawn weights included."""
    model = made("llama", num_hidden_layers=3)
    operations = {"gqa": {"kv_heads": 4, "merge": "random", "layers": [0]}}
    drawn = copy.deepcopy(model)
    drawn = apply_(drawn, plan_for(drawn, operations=operations, making={"seed": 5}))
    assert drawn is not model
    # There is one `gqa` per config; the second one here is another operation object.
    from surgery.calibration import Calibration, make_calibrated_plan
    from surgery.plan.registry import parse_operations

    chain = [
        *parse_operations(operations),
        *parse_operations({"gqa": {"kv_heads": 4, "merge": "optimal", "layers": [2]}}),
    ]
    together = make_calibrated_plan(model, chain, batches(1), Calibration(refine_steps=0), seed=5)
    after = plan_for(drawn, batches(1), kv_heads=4, merge="optimal", layers=[2])
    found = {name.split(".", 1)[1]: t for name, t in together.tensors.items()}
    for name, tensor in after.tensors.items():
        torch.testing.assert_close(found[name.split(".", 1)[1]], tensor, rtol=1e-4, atol=1e-5)


def test_learned_positions_made_rotary_first() -> None:
    model = made("gpt2")
    plan = plan_for(
        model,
        operations={"absolute_to_rope": {}, "gqa": {"kv_heads": 2, "merge": "optimal"}},
    )
    model = apply_(model, plan)
    assert {site.kv_heads for site in find_sites(model).sites} == {2}
    assert logits(model, unseen()).isfinite().all()
