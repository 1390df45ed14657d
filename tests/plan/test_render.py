"""The table a person reads."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from surgery.plan.make import make_plan
from surgery.plan.plan import Plan
from surgery.plan.render import build_plan_table, format_by_layer
from tests.families import family
from tests.operations.reference import gqa_plan


def rendered(plan: Plan) -> dict[str, str]:
    """First column → the rest of the row."""
    out = StringIO()
    Console(file=out, width=200).print(build_plan_table(plan))
    rows = [line.strip("│").split("│") for line in out.getvalue().splitlines() if "│" in line]
    return {first.strip(): " | ".join(cell.strip() for cell in rest) for first, *rest in rows}


def test_before_and_after_stand_side_by_side() -> None:
    rows = rendered(gqa_plan(family("llama"), 2))
    assert rows["query heads"] == "8 | 8 | "
    assert rows["KV heads"] == "8 | 2 | "
    assert rows["KV cache, 512 tokens"].endswith("0.25x")
    assert rows["operation gqa"] == "kv_heads=2, merge=mean, grouping=contiguous | 4 tensors | "
    assert rows["export"].startswith("native | transformers")


def test_runs_of_layers_are_named() -> None:
    plan = gqa_plan(family("llama", num_hidden_layers=4), 2, layers=[0, 1, 3])
    assert format_by_layer(plan.before, "kv_heads") == "8"
    assert format_by_layer(plan.after, "kv_heads") == "2 (0-1), 8 (2), 2 (3)"
    assert format_by_layer((), "kv_heads") == "-"


def test_an_operation_that_changes_nothing_says_so() -> None:
    assert "changes nothing" in rendered(gqa_plan(family("llama"), 8))["operation gqa"]


def test_what_is_left_alone_is_named() -> None:
    row = rendered(gqa_plan(family("minimax"), 2))["left alone"]
    assert "model.layers.0.self_attn" in row
    assert "linear attention" in row
    assert "left alone" not in rendered(make_plan(family("llama"), []))
