"""From `attention.*` in a config to typed specs, or to one error that names the key."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from surgery.errors import ConfigError
from surgery.operations.gqa.operation import GQA, Grouping, Merge
from surgery.operations.prune_heads.operation import PruneHeads
from surgery.plan.draft import Draft
from surgery.plan.operation import Operation
from surgery.plan.registry import list_operations, list_options, parse_operations

TYPES = "a whole number, a list with one number per layer, or {average: number}"
MERGES = "mean, first, random, aligned, aligned_renorm, optimal"
LAYERS = "list[int] | None"
GROUPINGS = "contiguous, similarity"
FIELDS = "kv_heads, merge, grouping, groups, layers"


def test_options_become_a_typed_spec() -> None:
    (spec,) = parse_operations({"gqa": {"kv_heads": 2, "merge": "first", "layers": [0, 2]}})
    assert spec == GQA(kv_heads=2, merge=Merge.first, layers=[0, 2])


def test_a_list_of_counts_is_taken_as_it_is() -> None:
    assert parse_operations({"gqa": {"kv_heads": [4, 2]}}) == [GQA([4, 2])]


def test_heads_by_layer_are_taken_as_they_are() -> None:
    spec = PruneHeads(heads={0: [1], 1: []})
    assert parse_operations({"prune_heads": {"heads": {0: [1], 1: []}}}) == [spec]
    written = json.loads(json.dumps(spec.to_json()))  # whose keys are text
    (read,) = parse_operations({written.pop("operation"): written})
    assert read == PruneHeads(heads={"0": [1], "1": []})


def test_what_is_not_given_has_its_default() -> None:
    assert parse_operations({"gqa": {"kv_heads": 4}}) == [GQA(4, Merge.mean)]


def test_a_budget_is_taken_as_it_is() -> None:
    (spec,) = parse_operations({"gqa": {"kv_heads": {"average": 2.5}, "grouping": "similarity"}})
    assert spec == GQA({"average": 2.5}, grouping=Grouping.similarity)
    written = json.loads(json.dumps(spec.to_json()))
    assert parse_operations({written.pop("operation"): written}) == [spec]


def test_nothing_declared_is_no_operation() -> None:
    assert parse_operations({}) == []


def test_a_spec_written_as_json_parses_to_itself() -> None:
    spec = GQA(2, Merge.random, layers=[1])
    written = spec.to_json()
    assert parse_operations({written.pop("operation"): written}) == [spec]


def test_names_and_fields_are_those_of_the_registry() -> None:
    assert {"gqa", "prune_heads"} <= set(list_operations())
    assert list_operations() == sorted(list_operations())
    assert list_options("gqa") == ["kv_heads", "merge", "grouping", "groups", "layers"]
    assert list_options("prune_heads") == [
        "heads",
        "amount",
        "count",
        "scores",
        "estimator",
        "scope",
        "uniform",
        "protect",
        "cut",
        "layers",
        "remove_attention",
        "refit",
        "schedule",
        "rounds",
        "until",
    ]
    assert list_options("no_such_thing") == []


@pytest.mark.parametrize(
    ("attention", "key", "valid"),
    [
        ({"gqa": {"kv_heads": 2, "heads": 3}}, "attention.gqa.heads", FIELDS),
        ({"gqa": {"kv_heads": "many"}}, "attention.gqa.kv_heads", TYPES),
        ({"gqa": {"kv_heads": 2.5}}, "attention.gqa.kv_heads", TYPES),
        ({"gqa": {"kv_heads": True}}, "attention.gqa.kv_heads", TYPES),
        ({"gqa": {"kv_heads": []}}, "attention.gqa.kv_heads", TYPES),
        ({"gqa": {"kv_heads": [2, "two"]}}, "attention.gqa.kv_heads", TYPES),
        ({"gqa": {"kv_heads": [2, 1.5]}}, "attention.gqa.kv_heads", TYPES),
        ({"gqa": {"kv_heads": {0: 2}}}, "attention.gqa.kv_heads", TYPES),
        ({"gqa": {"kv_heads": {"average": "3"}}}, "attention.gqa.kv_heads", TYPES),
        ({"gqa": {"kv_heads": {"average": 3, "most": 4}}}, "attention.gqa.kv_heads", TYPES),
        ({"gqa": {"kv_heads": 2, "grouping": "near"}}, "attention.gqa.grouping", GROUPINGS),
        ({"gqa": {"kv_heads": None}}, "attention.gqa.kv_heads", TYPES),
        ({"gqa": {"kv_heads": "???"}}, "attention.gqa.kv_heads", TYPES),
        ({"gqa": {}}, "attention.gqa.kv_heads", TYPES),
        ({"gqa": {"kv_heads": 2, "merge": "average"}}, "attention.gqa.merge", MERGES),
        ({"gqa": {"kv_heads": 2, "merge": None}}, "attention.gqa.merge", MERGES),
        ({"gqa": {"kv_heads": 2, "layers": 3}}, "attention.gqa.layers", LAYERS),
        ({"gqa": {"kv_heads": 2, "layers": ["first"]}}, "attention.gqa.layers", LAYERS),
        ({"gqa": {"kv_heads": 2, "layers": [0.5]}}, "attention.gqa.layers", LAYERS),
        ({"prune_heads": {"amount": "half"}}, "attention.prune_heads.amount", "in [0, 1]"),
        ({"prune_heads": {"scope": "some"}}, "attention.prune_heads.scope", "layer, global"),
        ({"prune_heads": {"cut": "keys"}}, "attention.prune_heads.cut", "groups, queries"),
        ({"prune_heads": {"layers": 1}}, "attention.prune_heads.layers", LAYERS),
        ({"gqa": 3}, "attention.gqa", None),
        ({"gqa": None}, "attention.gqa", None),
    ],
)
def test_what_cannot_be_names_the_key_and_what_would_do(
    attention: dict[str, Any], key: str, valid: str | None
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_operations(attention)
    assert caught.value.key == key
    assert caught.value.valid == valid


def test_an_unknown_operation_names_those_there_are() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_operations({"gqaa": {"kv_heads": 2}})
    assert caught.value.key == "attention.gqaa"
    assert caught.value.valid == ", ".join(list_operations())


def define_operation(default: int) -> None:
    @dataclass
    class Late(Operation):
        name = "late_in_a_test"
        size: int = default

        def plan(self, draft: Draft) -> None:
            draft.notes.append(self.name)


def test_a_class_defined_later_is_found_and_the_last_one_of_its_place_counts() -> None:
    list_operations()
    for default in (1, 2):  # a notebook's cell, run twice
        define_operation(default)
        (spec,) = parse_operations({"late_in_a_test": {}})
        assert spec.to_json()["size"] == default


def test_the_value_given_is_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_operations({"gqa": {"kv_heads": 2, "merge": "average"}})
    assert "given: 'average'" in str(caught.value)
