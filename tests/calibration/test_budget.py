"""A number of KV heads on average: spent where fewer of them hurt most."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.calibration import Calibration
from surgery.errors import ConfigError
from surgery.execute.live import apply_
from surgery.models.sites import find_sites
from surgery.operations.gqa.budget import find_cheapest
from tests.calibration.models import batches, made, plan_for
from tests.calibration.rewriting import Turning, rewrite_

costs = st.lists(
    st.dictionaries(st.sampled_from([1, 2, 4, 8]), st.floats(0, 10), min_size=1).map(
        lambda found: found | {1: found.get(1, 11.0)}
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(costs, st.integers(0, 30))
def test_the_cheapest_counts_are_those_of_looking_at_all(
    layers: list[dict[int, float]], spare: int
) -> None:
    total = len(layers) + spare
    found = find_cheapest(layers, total)
    within = [c for c in product(*layers) if sum(c) <= total]
    least = min(sum(layer[n] for layer, n in zip(layers, c, strict=True)) for c in within)
    assert tuple(found) in within
    spent = sum(layer[n] for layer, n in zip(layers, found, strict=True))
    assert spent == pytest.approx(least, abs=1e-9)


@pytest.mark.parametrize("merge", ["optimal", "mean"])
def test_heads_go_where_they_are_missed(merge: str) -> None:
    model = made("llama", num_hidden_layers=3, dtype=torch.float32)
    site = find_sites(model).sites[1]
    turning = Turning("half", 8)
    alike = [tuple(range(8))]
    if merge == "optimal":
        rewrite_(model, alike, turning, sites=[site])
    else:  # equal outright, since a mean sees through nothing
        attention = model.get_submodule(site.path)
        with torch.no_grad():
            for projection in (attention.k_proj, attention.v_proj):
                for tensor in projection.parameters():
                    tensor.copy_(torch.cat([tensor[:8]] * 8))
    options = Calibration(refine_steps=0)
    plan = plan_for(model, batches(2), options, kv_heads={"average": 3}, merge=merge)
    counts = [site.kv_heads for site in plan.after]
    assert sum(counts) <= 9
    assert counts[1] == 1
    assert min(counts[0], counts[2]) > 1
    assert plan.is_resolved
    assert plan.open_decisions == ()
    apply_(model, plan)
    assert [site.kv_heads for site in find_sites(model).sites] == counts


def test_native_means_as_many_everywhere() -> None:
    plan = plan_for(
        made("llama"), making={"native": True}, kv_heads={"average": 3}, merge="optimal"
    )
    assert [site.kv_heads for site in plan.after] == [2, 2]
    assert plan.export.format == "native"


def test_a_budget_for_some_layers() -> None:
    model = made("llama", num_hidden_layers=3)
    plan = plan_for(model, batches(1), kv_heads={"average": 4}, merge="mean", layers=[0, 2])
    counts = [site.kv_heads for site in plan.after]
    assert counts[1] == 8
    assert counts[0] + counts[2] <= 8


def test_all_that_there_are() -> None:
    plan = plan_for(made("llama"), batches(1), kv_heads={"average": 8}, merge="optimal")
    assert plan.changes == ()


@pytest.mark.parametrize("average", [0.5, 9])
def test_no_such_average(average: float) -> None:
    with pytest.raises(ConfigError, match="the average number of KV heads is out of range"):
        plan_for(made("llama"), kv_heads={"average": average}, merge="optimal")


def test_a_model_that_predicts_nothing() -> None:
    with pytest.raises(ConfigError, match="returns no logits"):
        plan_for(made("llama").model, batches(1), kv_heads={"average": 4}, merge="optimal")
