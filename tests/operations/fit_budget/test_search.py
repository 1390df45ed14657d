"""`fit_budget`: what it chooses is within the target, and the best there is."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from surgery.calibration import Calibration, make_calibrated_plan
from surgery.calibration.layer_choices import UNCHANGED, Walker
from surgery.errors import ConfigError
from surgery.execute.live import apply_
from surgery.models.sites import find_sites
from surgery.plan.make import make_plan
from surgery.plan.plan import Plan
from surgery.plan.registry import parse_operations
from tests.calibration.models import batches, made, unseen
from tests.families import logits

QUICK = Calibration(refine_steps=0, joint_steps=0)


def fit(kind: str = "llama", data: int = 6, **options: Any) -> Plan:
    model = made(kind, dtype=torch.float32)
    return make_calibrated_plan(
        model, parse_operations({"fit_budget": options}), batches(data), QUICK
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "bert"])
@pytest.mark.parametrize(
    "target", [{"kv_bytes": 0.5}, {"parameters": 0.97, "attention_flops": 0.8}], ids=str
)
def test_the_plan_is_within_the_target(kind: str, target: dict[str, float]) -> None:
    if kind == "bert" and "kv_bytes" in target:
        with pytest.raises(ConfigError, match=r"target\.kv_bytes: there is none of it"):
            fit(kind, target=target)
        return
    plan = fit(kind, target=target)
    for name, share in target.items():
        most = share * getattr(plan.sizes_before, name)
        assert getattr(plan.sizes_after, name) <= most
        said = plan.calibration["chosen"]["bounds"][name]
        assert said["most"] == pytest.approx(most)
        assert said["is"] >= getattr(plan.sizes_after, name)
    assert plan.is_resolved
    assert "fit_budget" not in {operation["operation"] for operation in plan.operations}


def test_query_heads_of_each_group_may_go() -> None:
    """Options of a choice hold: the cache stays, heads that are protected do too."""
    model = made("llama", dtype=torch.float32, num_key_value_heads=4)
    cut = {"prune_heads": {"cut": "queries", "protect": [0], "remove_attention": False}}
    options = {"target": {"attention_flops": 0.8}, "choices": cut}
    plan = make_calibrated_plan(model, parse_operations({"fit_budget": options}), batches(6), QUICK)
    assert plan.sizes_after.attention_flops <= 0.8 * plan.sizes_before.attention_flops
    assert plan.sizes_after.kv_bytes == plan.sizes_before.kv_bytes
    (spec,) = plan.operations
    removed = [heads for heads in spec["heads"].values() if heads]
    assert removed
    for heads in removed:
        assert 0 not in heads
        assert sorted(head // 2 for head in heads) == [0, 1, 2, 3]


def test_the_plan_is_one_like_any_other() -> None:
    """Closed, the same from its JSON, and performed as operations that somebody wrote by hand."""
    model = made("llama", dtype=torch.float32)
    plan = make_calibrated_plan(
        model, parse_operations({"fit_budget": {"target": {"kv_bytes": 0.5}}}), batches(6), QUICK
    )
    specs = {
        s["operation"]: {k: v for k, v in s.items() if k != "operation"} for s in plan.operations
    }
    by_hand = make_calibrated_plan(model, parse_operations(specs), batches(6), QUICK)
    results = [
        apply_(made("llama", dtype=torch.float32), one)
        for one in (plan, by_hand, Plan.from_json(plan.to_json(), plan.tensors))
    ]
    first, *others = [logits(result, unseen()) for result in results]
    for other in others:
        assert torch.equal(first, other)


def test_it_finds_what_is_best_of_all() -> None:
    """Of every choice for every layer within the target, none diverges less when measured whole."""
    model, data, share = made("llama", dtype=torch.float32), batches(6), 0.5
    operations = parse_operations(
        {"fit_budget": {"target": {"kv_bytes": share}, "choices": ["gqa"], "rounds": 2}}
    )
    (operation,) = operations
    searched = operation.make_operations()
    sites = find_sites(model).sites
    offered = [[c for one in searched for c in one.list_choices(site)] for site in sites]
    keys = [{choice.key for choice in choices} for choices in offered]
    walker = Walker(model, sites, searched, keys, data, QUICK, 2)
    costs = [
        {UNCHANGED: site.kv_heads, **{c.key: c.after.kv_heads for c in choices if c.after}}
        for site, choices in zip(sites, offered, strict=True)
    ]
    total = sum(site.kv_heads for site in sites)
    measured = {
        picked: walker.put(picked, lambda *_: None).whole
        for picked in product(*costs)
        if sum(c[key] for c, key in zip(costs, picked, strict=True)) <= share * total
    }
    plan = make_calibrated_plan(model, operations, data, QUICK)
    chosen = plan.calibration["chosen"]
    found = tuple((one["operation"], one["choice"]) for one in chosen["layers"])
    assert chosen["kl"] == pytest.approx(measured[found], rel=1e-4)
    assert measured[found] == pytest.approx(min(measured.values()), rel=1e-4)


def test_it_never_diverges_more_than_the_best_that_is_all_alike() -> None:
    mixed, alike = (fit(target={"kv_bytes": 0.5}, uniform=uniform) for uniform in (False, True))
    assert mixed.calibration["chosen"]["kl"] <= alike.calibration["chosen"]["kl"] * (1 + 1e-6)
    kinds = {(one["operation"], one["choice"]) for one in alike.calibration["chosen"]["layers"]}
    assert len(kinds) == 1


def test_a_loss_is_kept_to_and_something_is_saved() -> None:
    plan = fit(target={"loss": "+5%"})
    chosen = plan.calibration["chosen"]
    assert chosen["kl"] <= chosen["allowed"]
    assert plan.sizes_after.kv_bytes < plan.sizes_before.kv_bytes
    less = fit(target={"loss": "+0.001%"})
    assert less.sizes_after.kv_bytes >= plan.sizes_after.kv_bytes


def test_the_front_is_found_from_one_set_of_scores() -> None:
    """A share that is the target too has the target's choice; less of the cost never loses less."""
    shares = [0.25, 0.5, 0.75, 1.0]
    plan = fit(target={"kv_bytes": 0.5}, rounds=0, front=shares)
    chosen = plan.calibration["chosen"]
    front = {point["share"]: point for point in chosen["front"]}
    assert list(front) == shares
    assert front[0.5]["layers"] == chosen["layers"]
    assert front[0.5]["kl"] == chosen["kl"]
    assert front[1.0]["kl"] == pytest.approx(0, abs=1e-6)
    for share, point in front.items():
        assert point["is"] <= share * plan.sizes_before.kv_bytes
        assert point["kl"] <= point["uniform_kl"]
    losses = [front[share]["kl"] for share in shares]
    assert losses == sorted(losses, reverse=True)


def test_scores_of_an_earlier_run_are_used(tmp_path: Path, monkeypatch: Any) -> None:
    """The same plan without scoring anything; those of another model are refused."""
    first = fit(target={"kv_bytes": 0.5}, rounds=0)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(first.to_json()))
    options = {"target": {"kv_bytes": 0.5}, "rounds": 0, "scores": str(path)}
    monkeypatch.setattr(Walker, "score", None)
    again = fit(**options)
    assert again.to_json()["changes"] == first.to_json()["changes"]
    assert again.resolved == first.resolved
    with pytest.raises(
        ConfigError, match=r"attention\.fit_budget\.scores: is about a model with other"
    ):
        make_plan(made("llama", num_key_value_heads=4), parse_operations({"fit_budget": options}))
    path.write_text("{}")
    with pytest.raises(ConfigError, match=r"attention\.fit_budget\.scores: holds no scores"):
        fit(**options)


def test_nothing_to_do_changes_nothing() -> None:
    plan = fit(target={"kv_bytes": 1.0})
    assert not plan.changes_anything
    assert plan.calibration["chosen"]["kl"] == pytest.approx(0, abs=1e-6)


def test_other_operations_may_follow() -> None:
    model = made("llama", dtype=torch.float32)
    declared = {
        "fit_budget": {"target": {"kv_bytes": 0.5}, "choices": ["gqa"]},
        "attention_dropout": {"p": 0.1},
    }
    plan = make_calibrated_plan(model, parse_operations(declared), batches(6), QUICK)
    assert [spec["operation"] for spec in plan.operations] == ["gqa", "attention_dropout"]
    assert plan.config_patch["attention_dropout"] == 0.1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": {"kv_bytes": 0.01}, "choices": ["gqa"]}, ("cannot be reached", "at least")),
        (
            {"target": {"kv_bytes": 0.5}, "choices": ["rope"]},
            ("attention.fit_budget.choices", "gqa"),
        ),
        ({"target": {"kv_bytes": 0.5}, "choices": []}, ("attention.fit_budget.choices",)),
        (
            {"target": {"kv_bytes": 0.5}, "layers": [9]},
            ("attention.fit_budget.layers", "no such layer"),
        ),
    ],
)
def test_what_is_refused_while_planning(options: dict[str, Any], words: tuple[str, ...]) -> None:
    model = made("llama", dtype=torch.float32)
    with pytest.raises(ConfigError) as refusal:
        make_plan(model, parse_operations({"fit_budget": options}))
    for word in words:
        assert word in str(refusal.value)


def test_a_native_export_must_be_uniform() -> None:
    model = made("llama", dtype=torch.float32)
    operations = parse_operations({"fit_budget": {"target": {"kv_bytes": 0.5}}})
    with pytest.raises(ConfigError, match=r"attention\.fit_budget\.uniform"):
        make_plan(model, operations, native=True)


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"calibration\.windows.*too short"):
        fit(data=1, target={"kv_bytes": 0.5})


def test_targets_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match=r"target\.loss.*within the other bounds"):
        fit(target={"kv_bytes": 0.25, "loss": "+0.0001%"}, choices=["gqa"])
