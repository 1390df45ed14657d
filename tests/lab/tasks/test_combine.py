"""Tables of several tasks made one: what must not matter, and what must."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.config.schema import Combine
from surgery.errors import SurgeryError
from surgery.importance.table import ScoreTable, SiteScores
from surgery.lab.tasks import combine_scores

SHAPE = (3, 2)
SCORES = st.lists(st.floats(-5, 5), min_size=sum(SHAPE), max_size=sum(SHAPE)).filter(
    lambda found: sum(map(abs, found)) > 1e-3
)


def table(scores: Sequence[float], errors: Sequence[float] | None = None) -> ScoreTable:
    """Two layers of heads, and the same numbers as groups."""
    errors = errors or [0.5] * len(scores)
    sites, at = [], 0
    for layer, count in enumerate(SHAPE):
        rows = [tuple(row[at : at + count]) for row in (scores, errors)]
        sites.append(SiteScores(layer, f"l{layer}", rows[0], rows[1]))
        at += count
    return ScoreTable("leave_one_out", "lm", tuple(sites), tuple(sites), "m", "d", 2, 64)


def flat(found: ScoreTable, what: str = "scores") -> list[float]:
    assert found.heads == found.groups
    return [value for site in found.heads or () for value in getattr(site, what)]


def shares(scores: Sequence[float]) -> list[float]:
    return [score / sum(map(abs, scores)) for score in scores]


@given(SCORES, SCORES)
def test_the_worst_is_the_larger_share(a: list[float], b: list[float]) -> None:
    found = combine_scores({"a": table(a), "b": table(b)}, Combine.worst)
    assert flat(found) == pytest.approx(list(map(max, shares(a), shares(b))))
    assert flat(found) == flat(combine_scores({"b": table(b), "a": table(a)}, Combine.worst))


@given(SCORES, SCORES, st.floats(0, 4), st.floats(0.1, 4))
def test_weighted_is_a_mean_of_shares(a: list[float], b: list[float], v: float, w: float) -> None:
    found = combine_scores({"a": table(a), "b": table(b)}, Combine.weighted, {"a": v, "b": w})
    wanted = [(v * x + w * y) / (v + w) for x, y in zip(shares(a), shares(b), strict=True)]
    assert flat(found) == pytest.approx(wanted)
    spread = [v / sum(map(abs, a)) / 2, w / sum(map(abs, b)) / 2]
    assert flat(found, "errors") == pytest.approx([math.hypot(*spread) / (v + w)] * sum(SHAPE))


@pytest.mark.parametrize("how", Combine)
@given(a=SCORES, b=SCORES, scale=st.floats(0.01, 100))
def test_the_size_of_a_tasks_scores_is_no_vote(
    how: Combine, a: list[float], b: list[float], scale: float
) -> None:
    larger = table([score * scale for score in a], [0.5 * scale] * sum(SHAPE))
    one, other = (combine_scores({"a": t, "b": table(b)}, how) for t in (table(a), larger))
    assert flat(one) == pytest.approx(flat(other))


def test_errors_go_with_the_task_that_decides() -> None:
    a, b = table([1, 0, 0, 0, 1], [0.2] * 5), table([0, 2, 2, 0, 0], [0.4] * 5)
    found = combine_scores({"a": a, "b": b}, Combine.worst)
    assert flat(found) == [0.5, 0.5, 0.5, 0, 0.5]
    assert flat(found, "errors") == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.1])
    alone = combine_scores({"a": a, "b": b}, Combine.weighted, {"a": 0, "b": 3})
    assert flat(alone) == [0, 0.5, 0.5, 0, 0]


def test_says_what_it_is() -> None:
    found = combine_scores({"code": table([1] * 5), "prose": table([1] * 5)}, Combine.weighted)
    assert found.estimator == "weighted of leave_one_out"
    assert (found.data, found.model, found.batches, found.tokens) == ("code, prose", "m", 4, 128)
    assert ScoreTable.from_json(found.to_json()) == found


def test_a_task_that_needs_nothing_asks_for_nothing() -> None:
    found = combine_scores({"a": table([0] * 5), "b": table([1, 2, 3, 4, 0])})
    assert flat(found) == pytest.approx(shares([1, 2, 3, 4, 0]))


def test_one_unit_is_enough_if_all_have_it() -> None:
    heads = replace(table([1] * 5), groups=None)
    assert combine_scores({"a": heads, "b": heads}).groups is None
    with pytest.raises(SurgeryError, match="different heads"):
        combine_scores({"a": heads, "b": table([1] * 5)})


def test_refusals() -> None:
    one = table([1] * 5)
    with pytest.raises(SurgeryError, match="no score tables"):
        combine_scores({})
    for weights in ({"a": 1.0}, {"a": 1.0, "c": 1.0}, {"a": 0.0, "b": 0.0}, {"a": 2.0, "b": -1.0}):
        with pytest.raises(SurgeryError, match="weights"):
            combine_scores({"a": one, "b": one}, Combine.weighted, weights)
