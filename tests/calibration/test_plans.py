"""Calibrated plans: the same wherever they are made, and the same whoever performs them."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from surgery.calibration import Calibration
from surgery.errors import PlanError
from surgery.execute.live import apply_
from surgery.plan.make import make_plan
from surgery.plan.plan import Plan
from surgery.plan.registry import parse_operations
from surgery.plan.store import TENSORS, load_plan, save_plan
from tests.calibration.models import made, plan_for
from tests.calibration.on_file import performed
from tests.families import logits

ROOT = Path(__file__).parents[2]
OPTIONS = Calibration(refine_steps=3, keep_batches=2, rows=8)
GQA = {"kv_heads": 2, "merge": "optimal", "grouping": "similarity"}


def plan_of(model: PreTrainedModel) -> Plan:
    return plan_for(model, None, OPTIONS, operations={"gqa": GQA})


def bits(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert list(one) == list(two)
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype
        assert torch.equal(tensor, two[name]), name


def test_the_same_data_gives_the_same_plan_in_another_process_too() -> None:
    model = made("qwen2", dtype=torch.float32)
    plan = plan_of(model)
    assert plan.resolved
    assert plan_of(made("qwen2", dtype=torch.float32)).to_json() == plan.to_json()
    script = (
        "import torch, json; from tests.calibration.test_plans import *\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "print('DIGESTS', json.dumps(dict(plan_of(made('qwen2', dtype=torch.float32)).resolved)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    (line,) = [one for one in done.stdout.splitlines() if one.startswith("DIGESTS ")]
    assert json.loads(line.removeprefix("DIGESTS ")) == dict(plan.resolved)


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plan_from_disk_gives_the_same_bits_to_a_model_and_to_a_file(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = made(name, dtype=dtype)
    plan = plan_of(model)
    save_plan(plan, tmp_path)
    loaded = load_plan(tmp_path)
    assert loaded == plan
    assert_equal(dict(loaded.tensors), dict(plan.tensors))
    save_file(
        {n: t.contiguous() for n, t in model.named_parameters()}, tmp_path / "model.safetensors"
    )
    other = copy.deepcopy(model)
    apply_(model, plan)
    apply_(other, loaded)
    assert_equal(bits(model), bits(other))
    made_of_it = performed(loaded, tmp_path / "model.safetensors")
    assert made_of_it
    for tensor_name, tensor in made_of_it.items():
        assert torch.equal(tensor, model.get_parameter(tensor_name)), tensor_name


@pytest.fixture
def stored(tmp_path: Path) -> tuple[PreTrainedModel, Path]:
    model = made("llama", dtype=torch.float32)
    save_plan(plan_of(model), tmp_path)
    return model, tmp_path


def test_a_plan_without_its_tensors_changes_nothing(stored: tuple[PreTrainedModel, Path]) -> None:
    model, folder = stored
    before = bits(model)
    plan = replace(load_plan(folder), tensors={})
    for check in (True, False):
        with pytest.raises(PlanError, match="was loaded without its calibrated tensors"):
            apply_(model, plan, check=check)
        assert_equal(bits(model), before)
    last = plan.edits[-1].resolved[-1].name
    most = {name: t for name, t in load_plan(folder).tensors.items() if name != last}
    with pytest.raises(PlanError, match="was loaded without"):
        apply_(model, replace(plan, tensors=most), check=False)
    assert_equal(bits(model), before)


def test_tensors_of_another_shape_change_nothing(stored: tuple[PreTrainedModel, Path]) -> None:
    model, folder = stored
    before, plan = bits(model), load_plan(folder)
    last = plan.edits[-1].resolved[-1].name
    wrong = {**plan.tensors, last: plan.tensors[last][:-1]}
    with pytest.raises(PlanError, match=last.replace(".", r"\.")):
        apply_(model, replace(plan, tensors=wrong), check=False)
    assert_equal(bits(model), before)


@pytest.mark.parametrize("how", ["changed", "missing", "gone"])
def test_tensors_that_are_not_those_of_the_plan_are_refused(
    how: str, stored: tuple[PreTrainedModel, Path]
) -> None:
    _, folder = stored
    tensors = load_file(folder / TENSORS)
    first = next(iter(tensors))
    if how == "changed":
        tensors[first].view(-1)[0] += 1e-6
    else:
        del tensors[first]
    if how == "gone":
        (folder / TENSORS).unlink()
    else:
        save_file(tensors, folder / TENSORS)
    with pytest.raises(PlanError, match=r"plan\.safetensors"):
        load_plan(folder)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"merge": "optimal"}, "the coefficients of merge=optimal"),
        ({"grouping": "similarity"}, "which KV heads share"),
        ({"kv_heads": {"average": 3}}, "KV heads of each layer"),
    ],
)
@pytest.mark.parametrize("check", [True, False])
def test_open_decisions_are_no_plan_to_perform(
    options: dict[str, object], said: str, check: bool
) -> None:
    model = made("llama")
    before = bits(model)
    plan = make_plan(model, parse_operations({"gqa": {"kv_heads": 2, **options}}))
    assert not plan.is_resolved
    assert any(said in one for one in plan.open_decisions)
    with pytest.raises(PlanError, match="not calibrated yet"):
        apply_(model, plan, check=check)
    assert_equal(bits(model), before)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_the_hollow_plan_gives_the_structure() -> None:
    """For weights that are loaded next: an unresolved plan's shapes are the resolved one's."""
    model = made("llama", dtype=torch.float32)
    plan = plan_of(model)
    hollow = Plan.from_json(json.loads(json.dumps(plan.to_json()))).fill_zeros()
    shell = copy.deepcopy(model)
    apply_(shell, hollow, check=False)
    apply_(model, plan)
    assert {n: t.shape for n, t in shell.state_dict().items()} == {
        n: t.shape for n, t in model.state_dict().items()
    }
    shell.load_state_dict(model.state_dict())
    assert torch.equal(logits(shell), logits(model))


def test_what_was_predicted_without_data_holds() -> None:
    model = made("gpt2")
    options = {"gqa": {"kv_heads": 2, "merge": "optimal"}}
    planned = make_plan(model, parse_operations(options))
    plan = plan_for(model, None, Calibration(refine_steps=0), operations=options)
    assert planned.wanted == plan.wanted
    assert planned.sizes_after == plan.sizes_after
    assert planned.after == plan.after
    assert planned.export == plan.export
    apply_(model, plan)
    assert sum(p.numel() for p in model.parameters()) == plan.sizes_after.parameters


def test_a_plan_is_performed_once(stored: tuple[PreTrainedModel, Path]) -> None:
    model, folder = stored
    plan = load_plan(folder)
    apply_(model, plan)
    before = bits(model)
    apply_(model, load_plan(folder))
    assert_equal(bits(model), before)
