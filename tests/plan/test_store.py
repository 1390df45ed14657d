"""Plans on disk, without and with calibrated tensors; the digests that bind the two."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.errors import PlanError
from surgery.plan.digest import hash_tensor
from surgery.plan.plan import Plan
from surgery.plan.store import PLAN, TENSORS, load_plan, save_plan
from tests.families import family
from tests.operations.reference import gqa_plan


def plain() -> Plan:
    return gqa_plan(family("llama"), 2)


def with_tensors() -> Plan:
    tensors = {"0.a.query": torch.randn(2, 3), "0.a.output": torch.ones(2, dtype=torch.bfloat16)}
    return replace(
        plain(), tensors=tensors, resolved={n: hash_tensor(t) for n, t in tensors.items()}
    )


def test_a_plan_without_tensors_is_one_file(tmp_path: Path) -> None:
    save_plan(plain(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [PLAN]
    assert load_plan(tmp_path) == plain()


def test_tensors_come_back_to_the_bit(tmp_path: Path) -> None:
    plan = with_tensors()
    save_plan(plan, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([PLAN, TENSORS])
    loaded = load_plan(tmp_path)
    assert loaded == plan
    assert list(loaded.tensors) == list(plan.tensors)
    for name, tensor in plan.tensors.items():
        assert torch.equal(loaded.tensors[name], tensor)
        assert loaded.tensors[name].dtype == tensor.dtype


def test_views_are_stored_as_what_they_show(tmp_path: Path) -> None:
    wide = torch.randn(6, 4)
    tensors = {"a": wide.mT, "b": wide[::2]}
    plan = replace(
        plain(), tensors=tensors, resolved={n: hash_tensor(t) for n, t in tensors.items()}
    )
    save_plan(plan, tmp_path)
    assert torch.equal(load_plan(tmp_path).tensors["a"], wide.mT)


def test_the_json_names_no_number_of_the_tensors() -> None:
    plan = with_tensors()
    data = json.loads(json.dumps(plan.to_json()))
    assert "tensors" not in data
    assert data["resolved"] == dict(plan.resolved)
    assert Plan.from_json(data) == plan  # tensors are no part of equality


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda d: (d / PLAN).unlink(), "cannot be read"),
        (lambda d: (d / PLAN).write_text("{"), "cannot be read"),
        (lambda d: (d / PLAN).write_text("[]"), "is not a plan"),
        (lambda d: (d / PLAN).write_text("{}"), "a plan of format None"),
        (lambda d: (d / TENSORS).unlink(), "cannot be read"),
        (lambda d: (d / TENSORS).write_bytes(b"\0" * 40), "cannot be read"),
        (lambda d: (d / TENSORS).write_bytes((d / TENSORS).read_bytes()[:-1]), "cannot be read"),
    ],
)
def test_half_a_plan_is_refused(broken: object, said: str, tmp_path: Path) -> None:
    save_plan(with_tensors(), tmp_path)
    broken(tmp_path)  # type: ignore[operator]
    with pytest.raises(PlanError, match=said):
        load_plan(tmp_path)


def test_tensors_of_another_plan_are_refused(tmp_path: Path) -> None:
    save_plan(with_tensors(), tmp_path / "." if tmp_path.exists() else tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    save_plan(with_tensors(), other)  # drawn anew
    (other / TENSORS).replace(tmp_path / TENSORS)
    with pytest.raises(PlanError, match=r"does not hold the 0\.a\.query"):
        load_plan(tmp_path)


dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64])
shapes = st.lists(st.integers(0, 3), max_size=3)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(dtypes, shapes)
def test_a_digest_is_of_dtype_shape_and_every_bit(dtype: torch.dtype, shape: list[int]) -> None:
    tensor = torch.arange(1, 1 + max(1, 3 ** len(shape)))[: max(1, torch.Size(shape).numel())]
    if torch.Size(shape).numel() == 0:
        tensor = tensor[:0]
    tensor = tensor.to(dtype).reshape(shape)
    same = hash_tensor(tensor)
    assert (
        same
        == hash_tensor(tensor.clone())
        == hash_tensor(tensor.mT.contiguous().mT if len(shape) == 2 else tensor)
    )
    assert same != hash_tensor(tensor[None])
    assert same != hash_tensor(tensor.to(torch.int32))
    if tensor.numel():
        other = tensor.clone()
        other.view(-1)[-1] += 1
        assert same != hash_tensor(other)
