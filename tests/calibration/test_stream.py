"""Calibration that starts at its layer, against whole passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from surgery.calibration import Calibration, make_calibrated_plan, stream
from surgery.calibration.stream import check_stack
from surgery.models.sites import find_sites
from surgery.models.stack import NotResumable, find_stack
from surgery.plan.plan import Plan
from surgery.plan.registry import parse_operations
from tests.calibration.models import batches, made

OPTIONS = Calibration(refine_steps=2, rows=8)
GQA = {"gqa": {"kv_heads": 2, "merge": "optimal", "grouping": "similarity"}}
PRUNE = {"prune_heads": {"heads": {0: [0, 3], 2: [1]}, "refit": True}}
BUDGET = {"gqa": {"kv_heads": {"average": 3}, "merge": "optimal"}}


def check_and_forget(*given: Any) -> frozenset[int]:
    """Aim at outputs alone, as where every pass starts at the bottom."""
    check_stack(*given)
    return frozenset()


def start_at_the_bottom(*_: Any) -> None:
    raise NotResumable("a test wants whole passes")


def assert_same(one: Plan, other: Plan) -> None:
    assert one.changes == other.changes
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        torch.testing.assert_close(tensor, other.tensors[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("attention", [GQA, BUDGET, PRUNE], ids=["merge", "budget", "prune"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi", "glm4", "bert"])
def test_the_plan_is_that_of_whole_passes_bit_for_bit(
    kind: str, attention: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, operations = made(kind, num_hidden_layers=3), parse_operations(attention)
    monkeypatch.setattr(stream, "check_stack", check_and_forget)
    found = make_calibrated_plan(model, operations, batches(), OPTIONS)
    monkeypatch.setattr(stream, "find_stack", start_at_the_bottom)
    assert_same(found, make_calibrated_plan(model, operations, batches(), OPTIONS))


def count_runs(layers: int) -> int:
    """How often the first layer runs while all are calibrated."""
    model = made("llama", num_hidden_layers=layers)
    forward, runs = type(model.model.layers[0]).forward, []

    def count(layer: nn.Module, *args: Any, **options: Any) -> Any:
        if layer.self_attn.layer_idx == 0:
            runs.append(1)
        return forward(layer, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.model.layers[0]), "forward", count)
        make_calibrated_plan(model, parse_operations(GQA), batches(2), OPTIONS)
    return len(runs)


def test_layers_below_do_not_run_again() -> None:
    assert count_runs(5) == count_runs(3)


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1.0), (torch.bfloat16, 0.05)])
def test_layers_that_read_more_than_each_others_output_run_from_the_bottom(
    dtype: torch.dtype, share: float, capsys: pytest.CaptureFixture[str]
) -> None:
    model = made("llama", num_hidden_layers=3, dtype=dtype)
    layer = type(model.model.layers[0])
    forward, seen = layer.forward, {}

    def look_back(self: nn.Module, hidden: torch.Tensor, *args: Any, **options: Any) -> Any:
        """The last layer adds what the first one put out."""
        made_here = forward(self, hidden, *args, **options)
        number = self.self_attn.layer_idx
        if number == 2:
            return made_here + share * seen.pop("first")
        if number == 0:
            seen["first"] = made_here
        return made_here

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "forward", look_back)
        found = make_calibrated_plan(model, parse_operations(GQA), batches(), OPTIONS)
        assert "every pass starts at the bottom, because layer 2" in capsys.readouterr().out
        patch.setattr(stream, "find_stack", start_at_the_bottom)
        assert_same(found, make_calibrated_plan(model, parse_operations(GQA), batches(), OPTIONS))


def test_sites_in_another_order_than_their_layers_run_from_the_bottom() -> None:
    model = made("llama", num_hidden_layers=3)
    sites = find_sites(model).sites[::-1]
    with pytest.raises(NotResumable, match="order of its layers"):
        check_stack(model, find_stack(model, sites), sites, batches(1)[0])


SUMS = {
    "llama": True,
    "gpt2": True,
    "opt": True,
    "phi": False,  # attention and MLP read the same
    "cohere": False,
    "bert": True,  # normed after the sum
    "glm4": False,  # normed before it
}


@pytest.mark.parametrize("kind", SUMS)
def test_whether_outputs_are_only_added_is_asked(kind: str) -> None:
    model = made(kind, num_hidden_layers=3)
    sites = find_sites(model).sites
    found = check_stack(model, find_stack(model, sites), sites, batches(1)[0])
    assert found == (frozenset({1, 2}) if SUMS[kind] else frozenset())
