"""Which heads go by their scores, against selections made by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from surgery.errors import ConfigError
from surgery.importance import ScoreTable, SiteScores
from tests.operations.zoo_models import build, plan_of

# Two layers of four heads; two neighbours share a KV head where there are two.
SCORES = [[0.9, 0.1, 0.4, 0.3], [0.2, 0.8, 0.5, 0.6]]


def chosen(tmp_path: Path, kv_heads: int | None, table: Any = None, **options: Any) -> list[Any]:
    """Per layer, the query heads that are left."""
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({"scores": SCORES} if table is None else table))
    model = build("causal-lm", "llama", kv_heads=kv_heads)
    plan = plan_of(model, {"prune_heads": {"scores": str(path), **options}})
    left: list[Any] = [list(range(4)), list(range(4))]
    for change in plan.changes:
        left[change.before.layer] = [head for (head,) in change.query]
    for step in plan.steps:
        for site in step.arguments["sites"]:
            left[int(site.split(".")[2])] = []
    return left


@pytest.mark.parametrize(
    ("kv_heads", "options", "left"),
    [
        (None, {"count": 1}, [[0, 2, 3], [1, 2, 3]]),
        (None, {"count": 2}, [[0, 2], [1, 3]]),
        (None, {"count": 0}, [[0, 1, 2, 3], [0, 1, 2, 3]]),
        (None, {"amount": 0.5}, [[0, 2], [1, 3]]),
        (None, {"amount": 0.7}, [[0], [1]]),  # 2.8 heads are three
        (None, {"amount": 0.6}, [[0, 2], [1, 3]]),  # 2.4 are two
        (None, {"amount": 0.75}, [[0], [1]]),
        (None, {"amount": 0.0}, [[0, 1, 2, 3], [0, 1, 2, 3]]),
        (None, {"count": 2, "layers": [1]}, [[0, 1, 2, 3], [1, 3]]),
        # Of all eight, the lowest are 0.1, 0.2, 0.3, 0.4, 0.5.
        (None, {"count": 3, "scope": "global"}, [[0, 2], [1, 2, 3]]),
        (None, {"count": 5, "scope": "global"}, [[0], [1, 3]]),
        (None, {"amount": 0.5, "scope": "global"}, [[0], [1, 2, 3]]),
        # A layer's last head stays, whatever it scores: 0.9 of layer 0, so 0.8 is not reached.
        (None, {"count": 6, "scope": "global"}, [[0], [1]]),
        # Groups cost 1.0 and 0.7, and 1.0 and 1.1.
        (2, {"count": 2}, [[0, 1], [2, 3]]),
        (2, {"count": 3}, [[0, 1], [2, 3]]),  # one head alone cannot go
        (2, {"amount": 0.5}, [[0, 1], [2, 3]]),
        (2, {"count": 2, "scope": "global"}, [[0, 1], [0, 1, 2, 3]]),
        (2, {"count": 4, "scope": "global"}, [[0, 1], [2, 3]]),
        # The lower head of each group.
        (2, {"count": 2, "cut": "queries"}, [[0, 2], [1, 3]]),
        (2, {"amount": 0.5, "cut": "queries"}, [[0, 2], [1, 3]]),
        (2, {"count": 2, "cut": "queries", "scope": "global"}, [[0, 2], [0, 1, 2, 3]]),
        # What stays, whatever it scores; a group stays with any of its heads.
        (None, {"count": 2, "protect": [1]}, [[0, 1], [1, 3]]),
        (None, {"count": 2, "protect": {0: [1]}}, [[0, 1], [1, 3]]),
        (None, {"count": 3, "protect": {1: [0]}}, [[0], [0]]),
        (None, {"count": 3, "scope": "global", "protect": [1]}, [[0, 1], [1, 2, 3]]),
        (
            None,
            {"count": 4, "protect": [], "layers": [0], "remove_attention": True},
            [[], [0, 1, 2, 3]],
        ),
        (2, {"count": 2, "protect": [3]}, [[2, 3], [2, 3]]),
        (2, {"count": 2, "cut": "queries", "protect": [1, 2]}, [[1, 2], [1, 2]]),
        # With attention removed, whole layers may go.
        (None, {"count": 4, "remove_attention": True}, [[], []]),
        (None, {"amount": 1.0, "remove_attention": True, "layers": [0]}, [[], [0, 1, 2, 3]]),
        (2, {"count": 4, "remove_attention": True, "layers": [1]}, [[0, 1, 2, 3], []]),
    ],
)
def test_the_lowest_scores_go(
    tmp_path: Path, kv_heads: int | None, options: dict[str, Any], left: list[list[int]]
) -> None:
    assert chosen(tmp_path, kv_heads, **options) == left


TABLE = ScoreTable(
    "leave_one_out",
    "lm",
    heads=tuple(
        SiteScores(n, f"model.layers.{n}.self_attn", tuple(row), (0.1,) * 4)
        for n, row in enumerate(SCORES)
    ),
    # Not the sums: what two heads are worth together is measured.
    groups=tuple(
        SiteScores(n, f"model.layers.{n}.self_attn", row, (0.1,) * 2)
        for n, row in enumerate([(0.2, 0.9), (0.9, 0.2)])
    ),
)


@pytest.mark.parametrize("name", ["table.json", "table.parquet"])
@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"count": 2}, [[2, 3], [0, 1]]),
        ({"count": 2, "cut": "queries"}, [[0, 2], [1, 3]]),
        ({"count": 2, "layers": [1]}, [[0, 1, 2, 3], [0, 1]]),
    ],
)
def test_a_measured_table_has_scores_of_groups_too(
    name: str, options: dict[str, Any], left: list[list[int]], tmp_path: Path
) -> None:
    TABLE.save(tmp_path / "table.json")
    model = build("causal-lm", "llama", kv_heads=2)
    prune = {"scores": str(tmp_path / name), **options}
    plan = plan_of(model, {"prune_heads": prune})
    found = {change.before.layer: [head for (head,) in change.query] for change in plan.changes}
    assert [found.get(layer, [0, 1, 2, 3]) for layer in (0, 1)] == left
    only = replace(TABLE, heads=None)
    only.save(tmp_path / "table.json")
    if "cut" not in options:
        assert plan_of(model, {"prune_heads": prune}).changes == plan.changes
        return
    with pytest.raises(ConfigError, match="no scores of query heads, only of KV groups") as caught:
        plan_of(model, {"prune_heads": prune})
    assert caught.value.key == "attention.prune_heads.scores"


def test_a_table_of_some_layers_is_enough_for_these(tmp_path: Path) -> None:
    assert TABLE.heads is not None
    replace(TABLE, heads=TABLE.heads[1:], groups=None).save(tmp_path / "table.json")
    model = build("causal-lm", "llama")
    prune = {"scores": str(tmp_path / "table.json"), "count": 1}
    plan = plan_of(model, {"prune_heads": {**prune, "layers": [1]}})
    assert [site.q_heads for site in plan.after] == [4, 3]
    with pytest.raises(ConfigError, match="is for 1 layers; the model has 2"):
        plan_of(model, {"prune_heads": prune})


@pytest.mark.parametrize("content", [b"PAR1", b"", None])
def test_what_is_no_parquet(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"not a parquet file|cannot be read: No such") as caught:
        plan_of(build("causal-lm", "llama"), {"prune_heads": {"scores": str(path), "count": 1}})
    assert caught.value.key == "attention.prune_heads.scores"


def test_another_parquet_is_no_table(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table({"layer": [0], "head": [1]}), path)
    with pytest.raises(ConfigError, match="is not a score table"):
        plan_of(build("causal-lm", "llama"), {"prune_heads": {"scores": str(path), "count": 1}})


@pytest.mark.parametrize(
    ("kv_heads", "options", "note"),
    [
        (None, {"amount": 0.5}, None),
        (None, {"count": 2}, None),
        (None, {"count": 3, "scope": "global"}, None),
        (None, {"amount": 0.4}, "4 of 8 heads go (50.0%) for amount=0.4"),
        (None, {"amount": 0.4, "scope": "global"}, "3 of 8 heads go (37.5%) for amount=0.4"),
        (2, {"count": 3}, "4 of 8 heads go (50.0%) for count=3"),
        (None, {"count": 2, "uniform": True}, None),
        (None, {"count": 4, "uniform": True, "scope": "global"}, "every layer keeps 2 heads"),
    ],
)
def test_the_plan_says_the_real_share(
    tmp_path: Path, kv_heads: int | None, options: dict[str, Any], note: str | None
) -> None:
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(SCORES))
    model = build("causal-lm", "llama", kv_heads=kv_heads)
    plan = plan_of(model, {"prune_heads": {"scores": str(path), **options}})
    assert len(plan.notes) == (note is not None)
    if note is not None:
        assert note in plan.notes[0]


def test_a_bare_table_is_read_too(tmp_path: Path) -> None:
    assert chosen(tmp_path, None, SCORES, count=1) == [[0, 2, 3], [1, 2, 3]]


def test_ties_go_to_the_lower_layer_and_head(tmp_path: Path) -> None:
    even = [[1.0] * 4] * 2
    assert chosen(tmp_path, None, even, count=1) == [[1, 2, 3], [1, 2, 3]]
    assert chosen(tmp_path, None, even, count=4, scope="global") == [[3], [1, 2, 3]]
    assert chosen(tmp_path, 2, even, count=2) == [[2, 3], [2, 3]]


@pytest.mark.parametrize(
    ("table", "options", "key", "said"),
    [
        ("no table", {}, "scores", "is not a score table"),
        ({"heads": []}, {}, "scores", "is not a score table"),
        ([1.0, 2.0], {}, "scores", "is not a score table"),
        ([[1.0] * 4], {}, "scores", "is for 1 layers; the model has 2"),
        ([[1.0] * 4, [1.0] * 3], {}, "scores", "has 3 scores for the 4 heads of layer 1"),
        ([[1.0] * 4, [1.0, 2.0, None, 3.0]], {}, "scores", "a score of layer 1 is not a finite"),
        ([[1.0] * 4, [1.0, 2.0, float("nan"), 3.0]], {}, "scores", "of layer 1 is not a finite"),
        ([[True] * 4, [1.0] * 4], {}, "scores", "a score of layer 0 is not a finite"),
        (SCORES, {"count": 4}, "count", "a layer keeps at least one head"),
        (SCORES, {"amount": 1.0, "count": None}, "amount", "a layer keeps at least one head"),
        (SCORES, {"count": 7, "scope": "global"}, "count", "a layer keeps at least one head"),
    ],
)
def test_what_cannot_be_names_the_key(
    tmp_path: Path, table: Any, options: dict[str, Any], key: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        chosen(tmp_path, None, table, **{"count": 1, **options})
    assert caught.value.key == f"attention.prune_heads.{key}"


def test_more_than_can_go_names_how_many_can(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        chosen(tmp_path, None, count=7, scope="global")
    assert caught.value.valid.startswith("at most 6 heads, or attention.prune_heads.remove")
    with pytest.raises(ConfigError) as caught:
        chosen(tmp_path, 2, count=4)
    assert caught.value.valid.startswith("at most 2 heads")


def test_what_is_no_json(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text("scores: 1")
    attention = {"prune_heads": {"scores": str(path), "count": 1}}
    with pytest.raises(ConfigError, match="is not valid JSON") as caught:
        plan_of(build("causal-lm", "llama"), attention)
    assert caught.value.key == "attention.prune_heads.scores"
    assert '{"scores": [[' in str(caught.value.valid)
