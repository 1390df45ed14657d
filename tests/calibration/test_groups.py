"""Groups that are given: those heads share, whatever lies between them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from surgery.errors import ConfigError
from surgery.execute.live import apply_
from surgery.models.sites import find_sites
from surgery.operations.gqa.operation import GQA
from tests.calibration.models import plan_for
from tests.calibration.models import unseen as text
from tests.families import family, logits

GROUPS = {0: [[0, 3, 5, 6], [1, 2, 4, 7]], 1: [[7, 0, 2, 4], [1, 3, 5, 6]]}


@torch.no_grad()
def alike(groups: dict[int, list[list[int]]]) -> Any:
    """A Llama whose KV heads are equal within each group."""
    model = family("llama", dtype=torch.float32)
    for site in find_sites(model).sites:
        for role in ("key", "value"):
            weight = model.get_parameter(f"{site.get_projection(role).path}.weight")
            heads = weight.unflatten(0, (site.kv_heads, -1))
            for group in groups[site.layer]:
                heads[group] = heads[group[0]].clone()
    return model


@pytest.mark.parametrize("merge", ["mean", "optimal"])
@pytest.mark.parametrize("keys", [int, str])
def test_equal_heads_that_lie_apart_are_merged_without_loss(merge: str, keys: type) -> None:
    model = alike(GROUPS)
    before, untouched = logits(model, text()), copy.deepcopy(model)
    given = {keys(layer): groups for layer, groups in GROUPS.items()}
    apply_(model, plan_for(model, kv_heads=2, merge=merge, groups=given))
    assert {site.kv_heads for site in find_sites(model).sites} == {2}
    scale = float(before.abs().max())
    assert float((logits(model, text()) - before).abs().max()) < 1e-5 * scale
    apply_(untouched, plan_for(untouched, kv_heads=2, merge="mean"))
    assert float((logits(untouched, text()) - before).abs().max()) > 1e-2 * scale


def test_a_layer_that_is_not_named_goes_by_grouping(tmp_path: Path) -> None:
    """And a file has groups by number of KV heads."""
    model = alike({0: GROUPS[0], 1: [[0, 1, 2, 3], [4, 5, 6, 7]]})
    before = logits(model, text())
    file = tmp_path / "groups.json"
    file.write_text(json.dumps({"4": {}, "2": {"0": GROUPS[0]}}))
    plan = plan_for(model, kv_heads=2, groups=str(file))
    apply_(model, plan)
    assert float((logits(model, text()) - before).abs().max()) < 1e-5 * float(before.abs().max())
    assert plan.operations[0]["groups"] == {"0": GROUPS[0]}
    with pytest.raises(ConfigError, match="no groups for 1 KV heads"):
        GQA(kv_heads=1, groups=str(file))
    with pytest.raises(ConfigError, match="cannot be read"):
        GQA(kv_heads=1, groups=str(tmp_path / "nothing.json"))


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ({0: [[0, 1, 2], [3, 4, 5, 6, 7]]}, "into 2 equal groups"),
        ({0: [[0, 1, 2, 3], [4, 5, 6, 6]]}, "into 2 equal groups"),
        ({0: [[0, 1], [2, 3], [4, 5], [6, 7]]}, "into 2 equal groups"),
        ({0: [0, 1, 2, 3]}, "into 2 equal groups"),
        ({0: [["0", 1, 2, 3], [4, 5, 6, 7]]}, "into 2 equal groups"),
        ({5: [[0, 1, 2, 3], [4, 5, 6, 7]]}, "no such layer"),
        ([[0, 1, 2, 3], [4, 5, 6, 7]], "must be lists of heads by layer"),
    ],
)
def test_what_is_no_grouping_is_refused(groups: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        plan_for(family("llama"), kv_heads=2, groups=groups)
    assert caught.value.key == "attention.gqa.groups"


def test_a_budget_and_heads_that_cannot_move_are_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be given with an average"):
        GQA(kv_heads={"average": 2}, groups=GROUPS)
    with pytest.raises(ConfigError, match="cannot change places") as caught:
        plan_for(family("gpt_oss"), kv_heads=2, groups=GROUPS)
    assert caught.value.key == "attention.gqa.groups"
