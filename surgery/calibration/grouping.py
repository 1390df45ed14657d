"""Choose which KV heads share: groups of equal size with the lowest sum of pair costs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch

# Up to this many partitions are compared one by one.
EXACT = 40_000
Partition = tuple[tuple[int, ...], ...]


def make_contiguous_groups(heads: int, groups: int) -> Partition:
    """Make groups of neighbouring heads."""
    size = heads // groups
    return tuple(tuple(range(at, at + size)) for at in range(0, heads, size))


def partition(cost: torch.Tensor, groups: int) -> Partition:
    """Find the partition into `groups` equal groups with the lowest sum of pair costs.

    The result is exact if there are few partitions. Else heads are swapped as long as it helps,
    starting from greedy groups and from neighbours. Groups and their members are in ascending
    order.

    Args:
        cost: [H, H], symmetric.
    """
    heads = len(cost)
    size = heads // groups
    table = cost.tolist()
    if size == 1 or groups == 1:
        return make_contiguous_groups(heads, groups)
    best = (
        _search_exactly(table, size)
        if _count_partitions(heads, size) <= EXACT
        else _improve_by_swaps(table, size)
    )
    return tuple(sorted(tuple(sorted(group)) for group in best))


def _count_partitions(heads: int, size: int) -> int:
    total, left = 1, heads
    while left > size:
        choices = 1
        for n in range(1, size):  # the first head that is left is always in the next group
            choices = choices * (left - n) // n
        total *= choices
        left -= size
        if total > EXACT:
            break
    return total


def _sum_inside(cost: Sequence[Sequence[float]], group: Sequence[int]) -> float:
    return sum(cost[a][b] for a, b in combinations(group, 2))


def _search_exactly(cost: Sequence[Sequence[float]], size: int) -> list[tuple[int, ...]]:
    best: dict[tuple[int, ...], tuple[float, list[tuple[int, ...]]]] = {(): (0.0, [])}

    def solve(left: tuple[int, ...]) -> tuple[float, list[tuple[int, ...]]]:
        if left not in best:
            options = []
            for rest in combinations(left[1:], size - 1):
                group = (left[0], *rest)
                below, others = solve(tuple(head for head in left if head not in group))
                options.append((_sum_inside(cost, group) + below, [group, *others]))
            best[left] = min(options, key=lambda option: option[0])
        return best[left]

    return solve(tuple(range(len(cost))))[1]


def _improve_by_swaps(cost: Sequence[Sequence[float]], size: int) -> list[list[int]]:
    """Improve greedy groups and neighbours, so that the result is never worse than neighbours."""
    heads = len(cost)
    neighbours = [list(group) for group in make_contiguous_groups(heads, heads // size)]
    starts = (_group_greedily(cost, size), neighbours)
    return min(
        (_swap_heads(cost, groups) for groups in starts),
        key=lambda groups: sum(_sum_inside(cost, group) for group in groups),
    )


def _swap_heads(cost: Sequence[Sequence[float]], groups: list[list[int]]) -> list[list[int]]:
    """Swap the two heads that help most, as long as a swap helps; changes `groups`."""
    while True:
        gain, swap = -1e-15, None
        for one, two in combinations(range(len(groups)), 2):
            for a in groups[one]:
                for b in groups[two]:
                    change = _compute_change(cost, groups[one], groups[two], a, b)
                    if change < gain:
                        gain, swap = change, (one, two, a, b)
        if swap is None:
            return groups
        one, two, a, b = swap
        groups[one][groups[one].index(a)], groups[two][groups[two].index(b)] = b, a


def _compute_change(
    cost: Sequence[Sequence[float]], one: Sequence[int], two: Sequence[int], a: int, b: int
) -> float:
    """Compute by how much the sum changes if `a` of `one` and `b` of `two` change places."""
    before = sum(cost[a][x] for x in one if x != a) + sum(cost[b][x] for x in two if x != b)
    after = sum(cost[b][x] for x in one if x != a) + sum(cost[a][x] for x in two if x != b)
    return after - before


def _group_greedily(cost: Sequence[Sequence[float]], size: int) -> list[list[int]]:
    left = set(range(len(cost)))
    groups = []
    while left:
        # Start with the head that is hardest to place.
        first = max(left, key=lambda h: (min((cost[h][x] for x in left if x != h), default=0), -h))
        group = [first]
        left.remove(first)
        while len(group) < size:
            best = min(left, key=lambda h: (sum(cost[h][x] for x in group), h))
            group.append(best)
            left.remove(best)
        groups.append(group)
    return groups
