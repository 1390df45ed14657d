"""Rank correlation against its definition and known cases; heads that one task alone needs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.importance.table import ScoreTable, SiteScores
from surgery.lab.tasks.agreement import (
    compute_spearman,
    correlate_tasks,
    find_needed_by_one,
    rank_values,
)

VALUES = st.lists(st.integers(-3, 3) | st.floats(-9, 9), min_size=2, max_size=12)


def slow_ranks(values: Sequence[float]) -> list[float]:
    """By counting: those below, and half of those beside."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2
        for value in values
    ]


@given(VALUES)
def test_ranks_are_counted(values: list[float]) -> None:
    assert rank_values(values).tolist() == slow_ranks(values)


@given(st.data())
def test_is_pearsons_correlation_of_the_ranks(data: st.DataObject) -> None:
    first = data.draw(VALUES)
    second = data.draw(st.lists(st.integers(-3, 3), min_size=len(first), max_size=len(first)))
    found = compute_spearman(first, second)
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert found is None
    else:
        known = statistics.correlation(slow_ranks(first), slow_ranks(second))
        assert found == pytest.approx(known, abs=1e-9)


def test_known_cases() -> None:
    assert compute_spearman([1, 2, 3, 4], [10, 20, 30, 1000]) == pytest.approx(1.0)
    assert compute_spearman([1, 2, 3, 4], [9, 4, 3, 1]) == pytest.approx(-1.0)
    # Without ties: 1 - 6 sum d^2 / (n (n^2 - 1)), here with d = (1, 1, 0, 0).
    assert compute_spearman([1, 2, 3, 4], [2, 1, 3, 4]) == pytest.approx(1 - 6 * 2 / 60)


def table(*layers: Sequence[float]) -> ScoreTable:
    heads = tuple(
        SiteScores(number, f"l{number}", tuple(row), (0.0,) * len(row))
        for number, row in enumerate(layers)
    )
    return ScoreTable("leave_one_out", "lm", heads, None)


def test_the_matrix_is_over_all_heads_of_all_layers() -> None:
    tables = {"a": table([1, 2], [3, 4, 5]), "b": table([5, 4], [3, 2, 1])}
    matrix = correlate_tasks(tables | {"c": table([1, 1], [1, 1, 1])})
    assert matrix[0][:2] == pytest.approx([1, -1])
    assert matrix[1][:2] == pytest.approx([-1, 1])
    assert matrix[2] == [None] * 3
    assert [row[2] for row in matrix] == [None] * 3


def test_what_one_alone_needs() -> None:
    masks = {"a": {0: [0, 1], 1: [2]}, "b": {0: [1, 2], 1: []}, "c": {0: [1, 2]}}
    found = find_needed_by_one(masks, {0: 3, 1: 3})
    assert found == {"a": [[0, 2]], "b": [], "c": []}
    two = find_needed_by_one({"a": {0: [0]}, "b": {0: [1]}}, {0: 3})
    assert two == {"a": [[0, 1]], "b": [[0, 0]]}
