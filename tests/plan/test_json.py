"""A plan is data: written, read back, and refused where it is none."""

from __future__ import annotations

import json
from typing import Any

import pytest

from surgery.errors import PlanError
from surgery.plan.plan import FORMAT, Plan
from tests.families import family
from tests.operations.reference import gqa_plan

CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama_biased", {"layers": [1]}),
    ("olmo2", {"merge": "first"}),
    ("phi_normed", {"merge": "random"}),
    ("minimax", {}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_plan_reads_back_as_itself(name: str, options: dict[str, Any]) -> None:
    plan = gqa_plan(family(name), 2, **options)
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_a_plan_that_was_read_writes_the_same_text() -> None:
    plan = gqa_plan(family("olmo2"), 4)
    text = json.dumps(plan.to_json())
    assert json.dumps(Plan.from_json(json.loads(text)).to_json()) == text


@pytest.mark.parametrize("found", [FORMAT + 1, 0, "1", None])
def test_another_format_is_refused(found: object) -> None:
    data = gqa_plan(family("llama"), 2).to_json() | {"format": found}
    with pytest.raises(PlanError, match=f"format {found}; this version reads {FORMAT}"):
        Plan.from_json(data)


@pytest.mark.parametrize("part", ["changes", "before", "attributes", "sizes_after", "export"])
def test_a_plan_with_a_part_missing_is_refused(part: str) -> None:
    data = gqa_plan(family("llama"), 2).to_json()
    del data[part]
    with pytest.raises(PlanError, match="not a complete plan"):
        Plan.from_json(data)


def test_something_else_is_refused() -> None:
    with pytest.raises(PlanError, match="format None"):
        Plan.from_json({"hello": "world"})
