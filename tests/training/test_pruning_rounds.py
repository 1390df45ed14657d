"""Schedules of pruning in training: when rounds are due, how far gates are open, which heads go."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from surgery.errors import ConfigError
from surgery.importance.score_file import HeadScores
from surgery.models.sites import find_sites
from surgery.operations.prune_heads.closing import choose_closing
from surgery.operations.prune_heads.operation import PruneHeads
from surgery.operations.prune_heads.options import Schedule
from surgery.operations.prune_heads.schedule import PruningSchedule
from surgery.plan.registry import parse_operations
from tests.tiny_models import tiny_model

SITES = find_sites(tiny_model("llama", num_attention_heads=8, num_key_value_heads=4)).sites
SCOPES = st.sampled_from([("layer", False), ("layer", True), ("global", False), ("global", True)])


def _flat(heads: dict[int, list[int]]) -> list[tuple[int, int]]:
    return [(layer, head) for layer, found in heads.items() for head in found]


def _parsed(**spec: Any) -> list[Any]:
    return parse_operations({"prune_heads": spec})


def test_gradual_leaves_open_what_zhu_and_gupta_do() -> None:
    """Sparsity s_t = s_f + (s_i - s_f)(1 - (t - t_0) / (n dt))^3 (1710.01878, eq. 1): the share of
    the way from s_i to s_f that is left is the gate."""
    schedule = PruningSchedule.from_operation(PruneHeads(schedule=Schedule.gradual, until=0.4), 20)
    first, last = 0.1, 0.7
    for step in range(8):
        sparsity = last + (first - last) * (1 - (step - 0) / (8 * 1)) ** 3
        assert schedule.compute_gate(step) == pytest.approx((last - sparsity) / (last - first))
        assert not schedule.is_over(step)
    assert [schedule.compute_gate(step) for step in (0, 8, 9, 20)] == [1, 0, 0, 0]
    assert schedule.is_over(8)
    assert {schedule.count_due_rounds(step) for step in range(20)} == {1}


def test_iterative_rounds_are_spread_evenly() -> None:
    spec = PruneHeads(schedule=Schedule.iterative, rounds=3, until=0.5)
    schedule = PruningSchedule.from_operation(spec, 20)  # over 10 steps
    assert [schedule.count_due_rounds(step) for step in range(8)] == [1, 1, 1, 2, 2, 2, 3, 3]
    assert [schedule.is_over(step) for step in (5, 6, 20)] == [False, True, True]
    assert {schedule.compute_gate(step) for step in range(20)} == {0}


@given(st.integers(1, 300), st.integers(1, 12), st.floats(0.01, 1))
def test_every_round_has_a_step_of_its_own(total: int, rounds: int, until: float) -> None:
    spec = PruneHeads(schedule=Schedule.iterative, rounds=rounds, until=until)
    if rounds > max(1, round(until * total)):
        with pytest.raises(ConfigError, match="more rounds than steps"):
            PruningSchedule.from_operation(spec, total)
        return
    schedule = PruningSchedule.from_operation(spec, total)
    due = [schedule.count_due_rounds(step) for step in range(total + 1)]
    assert due[0] == 1
    assert due[schedule.end - 1] == due[-1] == rounds
    assert all(later - sooner in (0, 1) for sooner, later in itertools.pairwise(due))


@settings(max_examples=50)
@given(st.data())
def test_rounds_close_the_cheapest_and_reach_what_one_shot_takes(data: st.DataObject) -> None:
    cut, scope = data.draw(st.sampled_from(["groups", "queries"])), data.draw(SCOPES)
    rounds = data.draw(st.integers(1, 5))
    (operation,) = _parsed(
        amount=data.draw(st.sampled_from([0.0, 0.2, 0.5])),
        cut=cut,
        scope=scope[0],
        uniform=scope[1],
        schedule="iterative",
        estimator="random",
    )
    try:
        operation.choose(SITES, None)
    except ConfigError:  # too little for one head of every group, which is refused before training
        reject()
    numbers = st.lists(st.integers(-9, 9), min_size=8, max_size=8)
    closed: dict[int, list[int]] = {}
    for number in range(1, rounds + 1):
        scores = HeadScores(
            {site.layer: data.draw(numbers) for site in SITES},
            {site.layer: data.draw(numbers)[: site.kv_heads] for site in SITES},
        )
        after, going = choose_closing(operation, SITES, scores, closed, number / rounds)
        total = sum(map(len, going.values()))
        assert set(_flat(closed)) <= set(_flat(after)) <= set(_flat(going))
        # What goes at once is a group of two, or one head of each of four groups.
        move = 2 if cut == "groups" else 4
        assert abs(len(_flat(after)) - number / rounds * total) <= move / 2 + 1e-6
        if not closed:
            chosen = operation.choose(SITES, scores)
            assert going == {layer: heads for layer, heads in chosen.items() if heads}
        if cut == "groups":
            cost = {
                (site.layer, group): scores.groups[site.layer][group]
                for site in SITES
                for group in range(site.kv_heads)
            }
            new = {(layer, head // 2) for layer, head in set(_flat(after)) - set(_flat(closed))}
            later = {(layer, head // 2) for layer, head in set(_flat(going)) - set(_flat(after))}
            assert max(map(cost.__getitem__, new), default=-math.inf) <= min(
                map(cost.__getitem__, later), default=math.inf
            )
        closed = after
    assert closed == going
    assert total == sum(map(len, operation.choose(SITES, scores).values()))
