"""The heads of one layer: which have gone, and in what order the others would go at what cost."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from surgery.models.sites import Site
from surgery.operations.prune_heads.compensation import Surgeon
from surgery.operations.prune_heads.refit import list_columns

# Above any cost, and below any difference.
_LATER, _NEXT = 1e9, 1e-12


class LayerHeads:
    """What is known of the heads of a layer.

    A unit is what is measured alone: a KV group, or a query head. A move is what can go at once: a
    group, or a query head of every group.

    Attributes:
        costs: of each unit alone, when it was last measured.
        removed: query heads that have gone.

    Args:
        protected: query heads that stay.
        empty: whether all may go.
    """

    def __init__(
        self, site: Site, *, by_group: bool, protected: Collection[int] = (), empty: bool = False
    ) -> None:
        size = site.group_size if by_group else 1
        self.site, self.empty = site, empty
        self.units = [range(at, at + size) for at in range(0, site.q_heads, size)]
        length = len(self.units) if by_group else site.group_size
        # A move takes one of each.
        self._strands = [range(at, at + length) for at in range(0, len(self.units), length)]
        self._protected = {
            unit for unit, heads in enumerate(self.units) if set(heads) & set(protected)
        }
        self.costs = [0.0] * len(self.units)
        self.removed: set[int] = set()
        self.forget_order()

    def list_left(self, gone: Collection[int] = ()) -> list[int]:
        """List the query heads that are there, without these units."""
        going = self.removed.union(*(self.units[unit] for unit in gone))
        return [head for head in range(self.site.q_heads) if head not in going]

    def has_lost(self, unit: int) -> bool:
        return self.units[unit][0] in self.removed

    def count_moves(self, heads: int) -> int:
        """Count the moves that can still be made with so many query heads."""
        there = min(sum(not self.has_lost(unit) for unit in strand) for strand in self._strands)
        free = min(map(len, self._list_free()))
        each = len(self.units[0]) * len(self._strands)
        return max(0, min(there - (not self.empty), free, heads // each))

    def forget_order(self) -> None:
        self._moves: list[list[int]] = []
        self._curve: list[float] = []

    def add_move(self, move: list[int], cost: float) -> None:
        """Add what goes next, and what it costs together with all before it."""
        self._moves.append(move)
        self._curve.append(cost)

    def order_moves(self, surgeon: Surgeon, count: int) -> list[list[int]]:
        """Put units in an order in which each is the cheapest after those before it.

        What it costs after them is what it costs alone, and more as more of the output is missed
        without it by then; how much more, its own measurement says and the mean of the layer.
        """
        device = surgeon.weight.device
        columns = [list_columns(self.site, heads).to(device) for heads in self.units]
        free = self._list_free()
        alone = {unit: surgeon.compute_error(columns[unit]) for strand in free for unit in strand}
        cost = sum(max(0.0, self.costs[unit]) for unit in alone) / max(1, len(alone))
        error = sum(alone.values()) / max(1, len(alone))
        slopes = {
            unit: (max(0.0, self.costs[unit]) + cost) / max(alone[unit] + error, _NEXT)
            for unit in alone
        }
        moves = []
        for _ in range(count):
            move = []
            for strand in free:
                later = {
                    unit: self.costs[unit]
                    + slopes[unit] * (surgeon.compute_error(columns[unit]) - alone[unit])
                    for unit in strand
                }
                unit = min(strand, key=later.__getitem__)
                surgeon.remove(columns[unit])
                strand.remove(unit)
                move.append(unit)
            moves.append(move)
        return moves

    def rank(self) -> list[float]:
        """List what each unit costs after those before it; what has gone is first, and what has no
        place in the order last."""
        ranked = [-math.inf if self.has_lost(n) else _LATER + c for n, c in enumerate(self.costs)]
        for place, (move, cost) in enumerate(zip(self._moves, spread(self._curve), strict=True)):
            for unit in move:
                ranked[unit] = cost / len(move) + place * _NEXT
        return ranked

    def _list_free(self) -> list[list[int]]:
        return [
            [unit for unit in strand if not self.has_lost(unit) and unit not in self._protected]
            for strand in self._strands
        ]


def spread(curve: Sequence[float]) -> list[float]:
    """Spread the costs of the first 1, 2, … moves together over the moves.

    None gets less than the one before: these are the slopes of the greatest convex curve that is
    nowhere above, so that the cheapest moves of several layers are the cheapest choice.
    """
    blocks: list[tuple[float, int]] = []
    for cost, before in zip(curve, [0.0, *curve], strict=False):
        slope, count = cost - before, 1
        while blocks and blocks[-1][0] >= slope:
            other, many = blocks.pop()
            slope, count = (slope * count + other * many) / (count + many), count + many
        blocks.append((slope, count))
    return [slope for slope, count in blocks for _ in range(count)]
