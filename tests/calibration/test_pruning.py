"""`prune_heads` decided by calibration: which heads go, and when that is known."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from surgery.calibration import make_calibrated_plan
from surgery.errors import ConfigError, PlanError
from surgery.execute.live import apply_
from surgery.importance import ScoreTable
from surgery.models.sites import find_sites
from surgery.plan.make import make_plan
from surgery.plan.plan import Plan
from surgery.plan.registry import parse_operations
from surgery.plan.store import load_plan, save_plan
from tests.calibration.models import made, unseen
from tests.calibration.pruned import (
    OPTIONS,
    SCORES,
    assert_equal,
    batches,
    parsed,
    planned,
    table_of,
)
from tests.calibration.rewriting import Heads
from tests.families import logits, tokens

# Model, its KV heads, options; the heads that go, by the scores above.
CHOSEN: dict[str, tuple[str, int, dict[str, Any], dict[int, list[int]]]] = {
    "layer": ("llama", 8, {"amount": 0.4}, {0: [0, 2, 5], 1: [1, 6, 7]}),
    "global": ("llama", 8, {"count": 3, "scope": "global"}, {0: [2, 5], 1: [7]}),
    "protect": ("llama", 8, {"count": 2, "protect": [2]}, {0: [0, 5], 1: [1, 7]}),
    "one layer": ("llama", 8, {"count": 2, "layers": [1]}, {1: [1, 7]}),
    "uniform": (
        "llama",
        8,
        {"amount": 0.3, "scope": "global", "uniform": True},
        {0: [2, 5], 1: [1, 7]},
    ),
    # Groups are 0 1, 2 3, 4 5, 6 7: the lowest are 2 3, and 6 7.
    "groups": ("qwen2", 4, {"amount": 0.25}, {0: [2, 3], 1: [6, 7]}),
    "queries": ("qwen3", 4, {"count": 4, "cut": "queries"}, {0: [0, 2, 5, 7], 1: [1, 3, 4, 7]}),
    "packed": ("phi3", 8, {"amount": 0.25}, {0: [2, 5], 1: [1, 7]}),
    "conv1d": ("gpt2", 8, {"amount": 0.25}, {0: [2, 5], 1: [1, 7]}),
    "encoder": ("bert", 8, {"amount": 0.25}, {0: [2, 5], 1: [1, 7]}),
    "no attention": (
        "llama",
        8,
        {"amount": 1.0, "remove_attention": True, "layers": [0]},
        {0: list(range(8))},
    ),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_scored_heads_go_as_if_they_had_been_named(name: str) -> None:
    kind, kv_heads, options, heads = CHOSEN[name]
    fields = {} if kv_heads == 8 else {"num_key_value_heads": kv_heads}
    model = made(kind, dtype=torch.float32, **fields)
    plan = planned(model, {"estimator": "leave_one_out", **options}, scorer=table_of())
    named = {"heads": heads, "remove_attention": options.get("remove_attention", False)}
    other = make_plan(model, parse_operations({"prune_heads": named}))
    assert plan.is_resolved
    assert plan.resolved == {}
    assert (plan.changes, plan.steps, plan.after) == (other.changes, other.steps, other.after)
    assert_equal(apply_(copy.deepcopy(model), plan), apply_(model, other))


@pytest.mark.parametrize("estimator", ["gate_gradient", "output_norm", "leave_one_out", "random"])
def test_without_a_scorer_the_batches_are_measured(estimator: str) -> None:
    """A head that nobody reads is worth nothing to all but chance."""
    model = made("llama", dtype=torch.float32)
    dead = {0: [1, 6], 1: [0, 3]}
    with torch.no_grad():
        for site in find_sites(model).sites:
            for head in dead[site.layer]:
                for view in Heads(model, site).tensors("output", head):
                    view.zero_()
    plan = planned(model, {"count": 2, "estimator": estimator})
    assert plan.calibration is not None
    sites = plan.calibration["operations"][0]["sites"]
    gone = {n: site["removed"] for n, site in enumerate(sites.values())}
    # Another head may be harmful to an untrained model, and so worth less than nothing.
    if estimator in ("gate_gradient", "output_norm"):
        assert gone == dead
    for n, site in enumerate(sites.values()):
        assert len(site["scores"]) == len(site["standard_errors"]) == 8
        by_score = sorted(range(8), key=lambda head: (site["scores"][head], head))
        assert gone[n] == sorted(by_score[:2])
        if estimator != "random":
            assert all(abs(site["scores"][head]) < 1e-5 for head in dead[n])
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_who_scores_is_told_what_of() -> None:
    model = made("llama", dtype=torch.float32, num_key_value_heads=4)
    asked = []

    def scorer(*given: Any) -> ScoreTable:
        asked.append(given)
        return table_of()(*given)

    planned(model, {"count": 2, "estimator": "random", "layers": [1]}, scorer=scorer)
    planned(model, {"count": 4, "estimator": "output_norm", "cut": "queries"}, scorer=scorer)
    sites = find_sites(model).sites
    assert [(list(given[1]), *given[2:]) for given in asked] == [
        ([sites[1]], "random", "groups"),
        (list(sites), "output_norm", "heads"),
    ]
    assert all(given[0] is not model and given[0].config == model.config for given in asked)


def test_a_plan_from_disk_needs_no_data(tmp_path: Path) -> None:
    model = made("llama", dtype=torch.float32)
    plan = planned(model, {"amount": 0.4, "estimator": "random"}, scorer=table_of())
    save_plan(plan, tmp_path)
    loaded = load_plan(tmp_path)
    assert loaded == plan
    assert loaded.is_resolved
    assert loaded.calibration is not None
    figures = loaded.calibration["operations"][0]["sites"]["model.layers.0.self_attn"]
    assert figures == {
        "removed": [0, 2, 5],
        "estimator": "random",
        "unit": "groups",
        "scores": SCORES[0],
        "standard_errors": [0.1] * 7 + [None],
    }
    assert_equal(apply_(copy.deepcopy(model), loaded), apply_(model, plan))


def test_an_earlier_operation_leaves_fewer_layers() -> None:
    model = made("llama", dtype=torch.float32)
    first = {"heads": {0: list(range(8))}, "remove_attention": True}
    operations = [*parsed(first), *parsed({"count": 2, "estimator": "random"})]
    plan = make_calibrated_plan(model, operations, batches(), OPTIONS, table_of())
    one = apply_(copy.deepcopy(model), plan)
    two = apply_(model, make_plan(model, parse_operations({"prune_heads": first})))
    two = apply_(two, make_plan(two, parse_operations({"prune_heads": {"heads": [1, 7]}})))
    assert_equal(one, two)


class TestAgain:
    """A pruned model is a model: it is pruned, converted, trained and saved like another."""

    PRUNE = (
        {"amount": 0.25, "estimator": "leave_one_out"},
        {"amount": 0.25, "estimator": "leave_one_out", "scope": "global"},
    )

    @pytest.mark.parametrize("prune", PRUNE, ids=["uniform", "uneven"])
    def test_pruned_converted_and_trained(self, prune: dict[str, Any], tmp_path: Path) -> None:
        scores = [SCORES[0], [score + (n < 3) for n, score in enumerate(SCORES[1])]]
        model = made("qwen3", dtype=torch.float32)
        model = apply_(model, planned(model, prune, scorer=table_of(scores)))
        counts = [site.q_heads for site in find_sites(model).sites]
        assert counts == ([6, 6] if "scope" not in prune else [5, 7])
        again = {"count": 1, "estimator": "gate_gradient", "layers": [1]}
        model = apply_(model, planned(model, again))
        if counts == [6, 6]:
            model = apply_(model, planned(model, {"heads": {0: [0]}}))
        left = [site.q_heads for site in find_sites(model).sites]
        assert left == ([5, 5] if counts == [6, 6] else [5, 6])
        model = apply_(model, make_plan(model, parse_operations({"gqa": {"kv_heads": 1}})))
        assert {site.kv_heads for site in find_sites(model).sites} == {1}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        losses = []
        for _ in range(3):
            loss = model(**batches()[0]).loss
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
            optimizer.step()
        assert losses[-1] < losses[0]
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(logits(loaded, unseen()), logits(model.eval(), unseen()))
        native = "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
        assert native == (counts == [6, 6])

    def test_uniform_makes_unequal_layers_equal(self, tmp_path: Path) -> None:
        model = made("qwen3", dtype=torch.float32)
        apply_(model, make_plan(model, parse_operations({"prune_heads": {"heads": {0: [1, 2]}}})))
        uniform = {"amount": 0.3, "estimator": "output_norm", "scope": "global", "uniform": True}
        plan = planned(model, uniform, native=True)
        assert [site.q_heads for site in plan.after] == [5, 5]
        assert plan.export.format == "native"
        assert any("every layer keeps 5 heads" in note for note in plan.notes)
        apply_(model, plan)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(logits(loaded, unseen()), logits(model.eval(), unseen()))


@pytest.mark.parametrize(
    ("prune", "said"),
    [
        ({"amount": 0.4, "estimator": "random"}, ["which heads go, by random"]),
        ({"heads": [1], "refit": True}, ["output projections that are refitted"]),
        ({"count": 1, "estimator": "random", "refit": True}, ["which heads", "refitted"]),
        ({"count": 1, "estimator": "random", "schedule": "gradual"}, ["training decides which"]),
        ({"count": 1, "estimator": "random", "schedule": "iterative"}, ["training decides which"]),
    ],
)
def test_open_decisions_are_no_plan_to_perform(prune: dict[str, Any], said: list[str]) -> None:
    model = made("llama")
    plan = make_plan(model, parsed(prune))
    assert len(plan.open_decisions) == len(said)
    assert all(one in found for one, found in zip(said, plan.open_decisions, strict=True))
    with pytest.raises(PlanError, match="not calibrated yet"):
        apply_(model, plan)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    if "schedule" in prune:  # calibration leaves it to training
        assert planned(model, prune).open_decisions == plan.open_decisions
        assert not parsed(prune)[0].calibrated


def test_what_is_assumed_meanwhile_is_even() -> None:
    model = made("llama", num_hidden_layers=3)
    for scope in ("layer", "global"):
        plan = make_plan(model, parsed({"amount": 0.375, "estimator": "random", "scope": scope}))
        assert [site.q_heads for site in plan.after] == [5, 5, 5]
        calibrated = planned(model, {"amount": 0.375, "estimator": "random", "scope": scope})
        assert calibrated.sizes_after == plan.sizes_after


PRUNE = "attention.prune_heads"


def _nothing_finite(*given: Any) -> ScoreTable:
    return table_of([[float("nan"), *SCORES[0][1:]], SCORES[1]])(*given)


@pytest.mark.parametrize(
    ("prune", "more", "key", "said"),
    [
        (
            {"estimator": "leave_one_out"},
            {"data": [{"input_ids": tokens()}]},
            "estimator",
            "the calibration data has no labels",
        ),
        (
            {"estimator": "gate_gradient"},
            {"data": [{"input_ids": tokens()}]},
            "estimator",
            "the calibration data has no labels",
        ),
        ({"estimator": "random"}, {"data": []}, "", "there is no data to calibrate on"),
        ({"estimator": "random"}, {"scorer": _nothing_finite}, "estimator", "no finite score"),
        (
            {"estimator": "random", "scope": "global"},
            {"native": True},
            "scope",
            "may leave layers with different numbers",
        ),
        ({"heads": [1], "count": None, "refit": True}, {"data": []}, "", "there is no data"),
        (
            {"count": 6, "estimator": "random", "protect": [0, 1, 2]},
            {},
            "protect",
            "leaves only 5 heads of model.layers.0.self_attn to remove, but 6 should be removed",
        ),
    ],
)
def test_what_cannot_be_calibrated_names_the_key(
    prune: dict[str, Any], more: dict[str, Any], key: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        planned(made("llama"), {"count": 1, **prune}, **more)
    assert caught.value.key == (f"{PRUNE}.{key}" if key else PRUNE)


def test_no_labels_are_needed_where_no_loss_is_measured() -> None:
    model = made("llama", dtype=torch.float32)
    assert planned(
        model, {"count": 1, "estimator": "output_norm"}, data=[{"input_ids": tokens()}]
    ).is_resolved
