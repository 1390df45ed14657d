"""`estimator: elimination`: heads go where the others make up for them best."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from surgery.calibration import Calibration
from surgery.calibration.folds import Folds
from surgery.errors import ConfigError
from surgery.execute.live import apply_
from surgery.models.sites import find_sites
from surgery.plan.plan import Plan
from tests.calibration.models import batches, made, unseen
from tests.calibration.pruned import assert_same, planned
from tests.calibration.rewriting import Heads
from tests.families import logits

TINY = Calibration(refine_steps=0, joint_steps=0, ridge=1e-9)
BY = {"estimator": "elimination"}


def removed(plan: Plan) -> dict[str, list[int]]:
    (operation,) = plan.calibration["operations"]
    return {path: figures["removed"] for path, figures in operation["sites"].items()}


def costs(plan: Plan) -> list[list[float]]:
    (operation,) = plan.calibration["operations"]
    return [figures["scores"] for figures in operation["sites"].values()]


@torch.no_grad()
def make_alike_(model: PreTrainedModel, layer: int, *heads: int) -> PreTrainedModel:
    """Let these query heads, and their KV heads, attend alike; others read them as before."""
    site = find_sites(model).sites[layer]
    rows = Heads(model, site)
    for head in heads[1:]:
        for role in ("query", "key", "value"):
            share = 1 if role == "query" else site.group_size
            pairs = rows.tensors(role, head // share), rows.tensors(role, heads[0] // share)
            for mine, first in zip(*pairs, strict=True):
                mine.copy_(first)
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "gpt_neox", "opt"])
def test_what_others_say_too_goes_without_loss(kind: str) -> None:
    """Leaving out one of two heads that are alike costs much, until the other makes up for it."""
    model = make_alike_(made(kind, dtype=torch.float32), 1, 2, 5)
    before = logits(model, unseen())
    plan = planned(model, {**BY, "count": 1, "scope": "global"}, data=batches(6), options=TINY)
    first, second = removed(plan).values()
    assert first == []
    assert second in ([2], [5])
    assert_same(apply_(model, plan), before, share=1e-4)


def test_of_two_that_say_the_same_one_stays() -> None:
    """In the first round, each of them costs nothing; in the second, one of them much."""
    model = make_alike_(made("llama", dtype=torch.float32), 0, 2, 5)
    options = {**BY, "count": 2, "layers": [0], "rounds": 2}
    plan = planned(model, options, data=batches(6), options=TINY)
    (gone,) = removed(plan).values()
    assert len({2, 5} & set(gone)) == 1


def test_a_protected_head_makes_up_for_its_like() -> None:
    model = make_alike_(made("llama", dtype=torch.float32), 0, 2, 5)
    options = {**BY, "count": 1, "layers": [0], "protect": [2]}
    plan = planned(model, options, data=batches(6), options=TINY)
    assert list(removed(plan).values()) == [[5]]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_cost_is_that_of_the_refitted_model(kind: str) -> None:
    model = made(kind, dtype=torch.float32)
    data = batches(4)  # as many as folds: the first is not fitted to
    options = Calibration(refine_steps=0, joint_steps=0, ridge=0.01, budget_batches=1)
    assert all(bool((Folds(data).get(n, 24) == n).all()) for n in range(4))
    plan = planned(model, {**BY, "count": 2, "rounds": 1}, data=data, options=options)
    for layer, head in ((0, 3), (1, 6)):
        one = planned(
            model, {"heads": {layer: [head]}, "refit": True}, data=data[1:], options=options
        )
        p = logits(model, data[0]["input_ids"]).log_softmax(-1)
        q = logits(apply_(copy.deepcopy(model), one), data[0]["input_ids"]).log_softmax(-1)
        expected = float((p.exp() * (p - q)).sum(-1).mean())
        assert costs(plan)[layer][head] == pytest.approx(expected, rel=2e-3)


CUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "groups": (4, {"amount": 0.5}),
    "groups of all": (4, {"amount": 0.375, "scope": "global"}),
    "queries": (4, {"amount": 0.5, "cut": "queries"}),
    "heads of all": (8, {"amount": 0.4, "scope": "global"}),
    "protect": (8, {"count": 5, "protect": [0, 1]}),
    "uniform": (8, {"amount": 0.4, "scope": "global", "uniform": True}),
    "no attention": (8, {"amount": 1.0, "layers": [1], "remove_attention": True}),
}


@pytest.mark.parametrize("name", CUTS)
def test_as_many_go_as_by_any_estimator(name: str) -> None:
    kv_heads, options = CUTS[name]
    fields = {} if kv_heads == 8 else {"num_key_value_heads": kv_heads}
    model = made("llama", dtype=torch.float32, **fields)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = batches(3)
    plan = planned(model, {**BY, **options, "rounds": 3}, data=data)
    other = planned(model, {"estimator": "random", "refit": True, **options}, data=data)
    assert plan.is_resolved
    counts, others = (
        {path: len(heads) for path, heads in removed(p).items()} for p in (plan, other)
    )
    if options.get("scope") == "global":
        assert sum(counts.values()) == sum(others.values())
    else:
        assert counts == others
    assert not set(options.get("protect", [])) & {
        h for gone in removed(plan).values() for h in gone
    }
    roles = {tensor.rpartition(".")[2] for tensor in plan.resolved}
    assert roles == (set() if name == "no attention" else {"output", "output_bias"})
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    apply_(model, plan)


def test_a_model_that_predicts_nothing() -> None:
    with pytest.raises(ConfigError, match="returns no logits"):
        planned(made("llama").model, {**BY, "count": 1}, data=batches(1))


@pytest.mark.parametrize("schedule", ["iterative", "gradual"])
def test_heads_that_go_during_training(schedule: str) -> None:
    with pytest.raises(ConfigError, match="takes place before training") as caught:
        planned(made("llama"), {**BY, "count": 1, "schedule": schedule})
    assert caught.value.key == "attention.prune_heads.estimator"
