"""Partitions of heads into equal groups, against looking at every one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from surgery.calibration import grouping
from surgery.calibration.grouping import Partition, make_contiguous_groups, partition


def all_partitions(heads: tuple[int, ...], size: int) -> Iterator[Partition]:
    if not heads:
        yield ()
        return
    for rest in combinations(heads[1:], size - 1):
        group = (heads[0], *rest)
        for others in all_partitions(tuple(h for h in heads if h not in group), size):
            yield (group, *others)


def cost_of(cost: Tensor, groups: Partition) -> float:
    return sum(float(cost[a, b]) for group in groups for a, b in combinations(group, 2))


def random_costs(heads: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(heads, heads, generator=generator, dtype=torch.float64)
    return cost + cost.mT


SMALL = [(1, 1), (2, 1), (2, 2), (4, 2), (6, 2), (6, 3), (8, 2), (8, 4), (9, 3)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(SMALL), st.integers(0, 999))
def test_few_heads_are_partitioned_at_the_least_cost(shape: tuple[int, int], seed: int) -> None:
    heads, groups = shape
    cost = random_costs(heads, seed)
    found = partition(cost, groups)
    least = min(cost_of(cost, p) for p in all_partitions(tuple(range(heads)), heads // groups))
    assert cost_of(cost, found) == pytest.approx(least, abs=1e-9)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.sampled_from([(8, 4), (12, 4), (16, 8), (32, 8), (24, 2)]), st.integers(0, 999))
def test_many_heads_are_partitioned_no_worse_than_neighbours(
    shape: tuple[int, int], seed: int
) -> None:
    heads, groups = shape
    cost = random_costs(heads, seed)
    found = partition(cost, groups)
    assert cost_of(cost, found) <= cost_of(cost, make_contiguous_groups(heads, groups)) + 1e-9
    assert sorted(h for group in found for h in group) == list(range(heads))
    assert {len(group) for group in found} == {heads // groups}
    assert list(found) == sorted(tuple(sorted(group)) for group in found)
    assert found == partition(cost, groups)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.permutations(range(16)), st.sampled_from([2, 4, 8]), st.booleans())
def test_groups_that_cost_nothing_are_found(order: list[int], groups: int, exact: bool) -> None:
    size = 16 // groups
    hidden = [order[at : at + size] for at in range(0, 16, size)]
    cost = torch.ones(16, 16, dtype=torch.float64)
    for group in hidden:
        for a, b in combinations(group, 2):
            cost[a, b] = cost[b, a] = 0.0
    found = partition(cost, groups) if exact else _swapped(cost, size)
    assert [list(group) for group in found] == sorted(sorted(group) for group in hidden)


def _swapped(cost: Tensor, size: int) -> list[tuple[int, ...]]:
    found = grouping._improve_by_swaps(cost.tolist(), size)
    return sorted(tuple(sorted(group)) for group in found)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.sampled_from([(6, 3), (8, 4), (8, 2)]), st.integers(0, 999))
def test_swaps_never_end_above_neighbours_either(shape: tuple[int, int], seed: int) -> None:
    heads, groups = shape
    cost = random_costs(heads, seed)
    swapped = _swapped(cost, heads // groups)
    assert (
        cost_of(cost, tuple(swapped)) <= cost_of(cost, make_contiguous_groups(heads, groups)) + 1e-9
    )


@pytest.mark.parametrize(("heads", "groups"), [(6, 6), (6, 1), (1, 1)])
def test_where_nothing_is_to_choose(heads: int, groups: int) -> None:
    assert partition(random_costs(heads, 0), groups) == make_contiguous_groups(heads, groups)


def test_equal_costs_leave_neighbours_together() -> None:
    assert partition(torch.ones(8, 8, dtype=torch.float64), 4) == make_contiguous_groups(8, 4)
