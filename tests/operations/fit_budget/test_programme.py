"""The integer programme against all choices, one by one."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from surgery.operations.fit_budget.programme import choose

NUMBERS = st.integers(0, 20).map(float)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list, list, list]:
    layers, bounds = draw(st.integers(1, 4)), draw(st.integers(0, 2))
    keys = [("op", str(n)) for n in range(draw(st.integers(1, 4)))]

    def numbers() -> list[dict[tuple[str, str], float]]:
        return [{key: draw(NUMBERS) for key in keys} for _ in range(layers)]

    return numbers(), [numbers() for _ in range(bounds)], [draw(NUMBERS) for _ in range(bounds)]


@given(problems())
def test_no_choice_within_the_bounds_loses_less(problem: tuple[list, list, list]) -> None:
    losses, costs, most = problem

    def is_within(picked: tuple) -> bool:
        sums = (sum(layer[key] for layer, key in zip(cost, picked, strict=True)) for cost in costs)
        return all(spent <= bound for spent, bound in zip(sums, most, strict=True))

    def lose(picked: tuple) -> float:
        return sum(layer[key] for layer, key in zip(losses, picked, strict=True))

    for uniform in (False, True):
        found = choose(losses, costs, most, uniform=uniform)
        every = [
            picked
            for picked in product(*losses)
            if is_within(picked) and (not uniform or len(set(picked)) == 1)
        ]
        if not every:
            assert found is None
            continue
        assert found is not None
        assert tuple(found) in every
        assert lose(tuple(found)) == min(map(lose, every))
