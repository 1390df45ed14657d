"""The order in which heads of one layer go, and what each costs after those before it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.operations.prune_heads.compensation import Surgeon
from surgery.operations.prune_heads.layer_heads import spread

RIDGE = 0.1


def solve(inputs: torch.Tensor, weight: torch.Tensor, kept: list[int]) -> float:
    """|X W^T - X' W'^T|² + ridge |W - W'|² at its least, where W' has only the columns kept."""
    pull = (RIDGE * float(inputs.square().sum(0).mean())) ** 0.5
    rows = torch.cat([inputs, pull * torch.eye(inputs.shape[1], dtype=inputs.dtype)])
    wanted = rows @ weight.mT
    found = torch.linalg.lstsq(rows[:, kept], wanted).solution
    return float((wanted - rows[:, kept] @ found).square().sum())


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 99), st.permutations(range(4)))
def test_what_is_lost_is_what_least_squares_leaves(seed: int, order: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs, mix, weight = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((40, 8), (8, 8), (5, 8))
    )
    inputs = inputs @ mix
    surgeon = Surgeon(inputs.mT @ inputs, weight, RIDGE)
    kept, lost = list(range(8)), 0.0
    for block in order[:3]:
        columns = torch.tensor([2 * block, 2 * block + 1])
        lost += surgeon.compute_error(columns)
        surgeon.remove(columns)
        kept = [n for n in kept if n // 2 != block]
        assert lost == pytest.approx(solve(inputs, weight, kept), rel=1e-6)
        assert float(surgeon.weight[:, columns].abs().max()) < 1e-8


curves = st.lists(st.floats(-1, 10), max_size=7)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(curves)
def test_costs_are_slopes_of_the_greatest_convex_curve_below(curve: list[float]) -> None:
    found, points = spread(curve), [0.0, *curve]
    assert len(found) == len(curve)
    assert all(b >= a - 1e-9 for a, b in pairwise(found))
    for place in range(len(points)):
        # Nowhere above a line between two points, and on the lowest of those lines.
        lines = [
            points[a] + (points[b] - points[a]) * (place - a) / (b - a)
            for a in range(place)
            for b in range(place + 1, len(points))
        ]
        assert sum(found[:place]) == pytest.approx(min([points[place], *lines]), abs=1e-9)
