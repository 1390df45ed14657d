"""Which KV heads share: groups of equal size that cost least, pair by pair."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch

# Up to so many partitions are looked at one by one.
EXACT = 40_000
Groups = tuple[tuple[int, ...], ...]


def contiguous(heads: int, groups: int) -> Groups:
    """Runs of neighbours."""
    size = heads // groups
    return tuple(tuple(range(at, at + size)) for at in range(0, heads, size))


def partition(cost: torch.Tensor, groups: int) -> Groups:
    """The partition into `groups` equal groups whose pairs cost least in sum.

    Exact where few partitions exist; else greedy, then swaps of two heads while one helps. Groups
    and their members come in ascending order.

    Args:
        cost: [H, H], symmetric.
    """
    heads = len(cost)
    size = heads // groups
    table = cost.tolist()
    if size == 1 or groups == 1:
        return contiguous(heads, groups)
    found = _exact(table, size) if _count(heads, size) <= EXACT else _swapped(table, size)
    return tuple(sorted(tuple(sorted(group)) for group in found))


def _count(heads: int, size: int) -> int:
    total, left = 1, heads
    while left > size:
        choices = 1
        for n in range(1, size):  # the first that is left is always taken
            choices = choices * (left - n) // n
        total *= choices
        left -= size
        if total > EXACT:
            break
    return total


def _inside(cost: Sequence[Sequence[float]], group: Sequence[int]) -> float:
    return sum(cost[a][b] for a, b in combinations(group, 2))


def _exact(cost: Sequence[Sequence[float]], size: int) -> list[tuple[int, ...]]:
    best: dict[tuple[int, ...], tuple[float, list[tuple[int, ...]]]] = {(): (0.0, [])}

    def solved(left: tuple[int, ...]) -> tuple[float, list[tuple[int, ...]]]:
        if left not in best:
            options = []
            for rest in combinations(left[1:], size - 1):
                group = (left[0], *rest)
                below, others = solved(tuple(head for head in left if head not in group))
                options.append((_inside(cost, group) + below, [group, *others]))
            best[left] = min(options, key=lambda option: option[0])
        return best[left]

    return solved(tuple(range(len(cost))))[1]


def _swapped(cost: Sequence[Sequence[float]], size: int) -> list[list[int]]:
    groups = _greedy(cost, size)
    while True:
        gain, swap = -1e-15, None
        for one, two in combinations(range(len(groups)), 2):
            for a in groups[one]:
                for b in groups[two]:
                    change = _change(cost, groups[one], groups[two], a, b)
                    if change < gain:
                        gain, swap = change, (one, two, a, b)
        if swap is None:
            return groups
        one, two, a, b = swap
        groups[one][groups[one].index(a)], groups[two][groups[two].index(b)] = b, a


def _change(
    cost: Sequence[Sequence[float]], one: Sequence[int], two: Sequence[int], a: int, b: int
) -> float:
    """What the sum changes by where `a` of `one` and `b` of `two` change places."""
    before = sum(cost[a][x] for x in one if x != a) + sum(cost[b][x] for x in two if x != b)
    after = sum(cost[b][x] for x in one if x != a) + sum(cost[a][x] for x in two if x != b)
    return after - before


def _greedy(cost: Sequence[Sequence[float]], size: int) -> list[list[int]]:
    left = set(range(len(cost)))
    groups = []
    while left:
        # Whoever is hardest to place chooses first.
        first = max(left, key=lambda h: (min((cost[h][x] for x in left if x != h), default=0), -h))
        group = [first]
        left.remove(first)
        while len(group) < size:
            best = min(left, key=lambda h: (sum(cost[h][x] for x in group), h))
            group.append(best)
            left.remove(best)
        groups.append(group)
    return groups
