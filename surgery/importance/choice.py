"""Choose heads by name, or by their scores: a fraction or a number of heads, lowest first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.errors import ConfigError
from surgery.importance.score_file import HeadScores
from surgery.models.sites import Site

# 0.3 of 10 heads is 3, even where floating point says a little more or less.
_ROUNDING = 1e-9

# Layer → query heads, ascending.
Heads = dict[int, list[int]]
SHAPE = "a list of heads for every layer, or {layer: [heads]}"


def parse_head_lists(given: Any, sites: Sequence[Site], key: str) -> Heads:
    """Parse lists of heads as the options of operations that remove heads hold them.

    Args:
        given: one list for every site, or layer → list; numbers of layers may be text.

    Returns:
        Layer → query heads, ascending, each once.

    Raises:
        ConfigError: a layer or head does not exist, or a value is not a list of heads.
    """
    by_layer: dict[int, Any] = {}
    if isinstance(given, Mapping):
        known = {site.layer for site in sites}
        for layer, heads in given.items():
            number = int(layer) if str(layer).isdigit() else layer
            if number not in known:
                raise ConfigError(key, "there is no such layer", given=layer, valid=sorted(known))
            by_layer[number] = heads
    else:
        by_layer = {site.layer: given for site in sites}
    for site in sites:
        heads = by_layer.get(site.layer, [])
        if not isinstance(heads, (list, tuple)) or not all(type(h) is int for h in heads):
            raise ConfigError(key, "must be a list of heads", given=repr(heads), valid=SHAPE)
        for head in heads:
            if not 0 <= head < site.q_heads:
                raise ConfigError(
                    key,
                    f"{site.path} has no such head",
                    given=head,
                    valid=f"0 to {site.q_heads - 1}",
                )
    return {layer: sorted(set(heads)) for layer, heads in by_layer.items()}


@dataclass(frozen=True)
class HeadCut:
    """How many heads to remove, and how they are counted.

    Attributes:
        amount, count: the fraction of the heads, or their number; one of the two.
        together: whether heads are counted over all layers, or in each layer.
        uniform: whether all layers keep the same number of heads.
        by_group: whether whole KV groups are removed, or the same number of query heads from
            every group.
        empty: whether a layer may lose all its heads.
        prefix: dotted config key of the options, for messages.
        allow_empty: how to let a layer lose all its heads, for messages; "" if there is no way.
    """

    amount: float | None
    count: int | None
    together: bool = False
    uniform: bool = False
    by_group: bool = True
    empty: bool = False
    prefix: str = "heads"
    allow_empty: str = ""

    @property
    def key(self) -> str:
        return f"{self.prefix}.{'amount' if self.count is None else 'count'}"

    @property
    def given(self) -> float | None:
        return self.amount if self.count is None else self.count

    def count_moves(self, heads: int, each: int, most: int) -> int:
        """Count how many times `each` heads are removed from `heads`.

        An amount is rounded to the nearest whole number (a half down), but rounding alone never
        makes it larger than `most`. A count is rounded down.
        """
        if self.count is not None:
            return self.count // each
        exact = (self.amount or 0.0) * heads / each
        nearest = math.ceil(exact - 0.5 - _ROUNDING)
        return min(nearest, max(most, math.floor(exact + _ROUNDING)))


@dataclass(frozen=True)
class _Layer:
    """The heads of a site in the order in which they can be removed, the cheapest first.

    Attributes:
        moves: cost per head, and the heads that one move removes.
        each: heads per move.
        all: number of moves if no head were protected.
    """

    site: Site
    moves: list[tuple[float, list[int]]]
    each: int
    all: int

    def count_removable(self, empty: bool) -> int:
        return min(len(self.moves), self.all - (not empty))


def choose_heads(
    sites: Sequence[Site],
    scores: HeadScores,
    wanted: HeadCut,
    protected: Mapping[int, Sequence[int]] | None = None,
) -> dict[int, list[int]]:
    """Choose the heads to remove: layer → query heads, ascending.

    One move removes a KV group with its query heads, or one query head of every group (the lowest
    that is left in each). Ties go to the lower layer and head. If the groups of the layers differ
    in size, they are compared by their score per head.

    Args:
        scores: scores of every site.
        protected: layer → query heads that stay; with `by_group` their whole groups stay.

    Raises:
        ConfigError: that many heads cannot be removed.
    """
    layers = [
        _rank_moves(site, scores, wanted.by_group, (protected or {}).get(site.layer, ()))
        for site in sites
    ]
    if wanted.uniform:
        counts = _count_uniform(layers, wanted)
    elif wanted.together:
        counts = _count_together(layers, wanted)
    else:
        counts = [
            wanted.count_moves(layer.site.q_heads, layer.each, layer.count_removable(wanted.empty))
            for layer in layers
        ]
        for layer, count in zip(layers, counts, strict=True):
            _check_enough(count * layer.each, [layer], wanted)
    return {
        layer.site.layer: sorted(head for _, heads in layer.moves[:count] for head in heads)
        for layer, count in zip(layers, counts, strict=True)
    }


def _rank_moves(site: Site, scores: HeadScores, by_group: bool, protected: Sequence[int]) -> _Layer:
    size, stay = site.group_size, set(protected)
    groups = [list(range(start, start + size)) for start in range(0, site.q_heads, size)]
    heads = None if scores.heads is None else scores.heads[site.layer]
    if by_group:
        if scores.groups is not None:
            costs = list(scores.groups[site.layer])
        else:
            assert heads is not None
            costs = [sum(heads[head] for head in group) for group in groups]
        free = [
            (cost / size, group)
            for cost, group in zip(costs, groups, strict=True)
            if not stay & set(group)
        ]
        return _Layer(site, sorted(free), size, site.kv_heads)
    assert heads is not None
    costs = list(heads)
    ranked = [
        sorted((head for head in group if head not in stay), key=lambda h: (costs[h], h))
        for group in groups
    ]
    moves = [
        (sum(costs[head] for head in move) / len(groups), list(move))
        for move in zip(*ranked, strict=False)
    ]
    return _Layer(site, moves, site.kv_heads, size)


def _count_together(layers: Sequence[_Layer], wanted: HeadCut) -> list[int]:
    total = sum(layer.site.q_heads for layer in layers)
    sizes = {layer.each for layer in layers}
    each = sizes.pop() if len(sizes) == 1 else 1
    most = sum(layer.count_removable(wanted.empty) * layer.each for layer in layers)
    left = each * wanted.count_moves(total, each, most // each)
    _check_enough(left, layers, wanted)
    # The moves of a layer are made in order, so the cheapest is always the next of some layer.
    ranked = sorted(
        (cost, number, place)
        for number, layer in enumerate(layers)
        for place, (cost, _) in enumerate(layer.moves[: layer.count_removable(wanted.empty)])
    )
    counts = [0] * len(layers)
    for _, number, _ in ranked:
        if left >= layers[number].each:
            counts[number] += 1
            left -= layers[number].each
    return counts


def _count_uniform(layers: Sequence[_Layer], wanted: HeadCut) -> list[int]:
    """Count the moves per layer after which all layers have the same number of heads."""
    each = _find_common_step(layers, wanted)
    smallest = min(layer.all for layer in layers)
    before = sum(layer.all for layer in layers)
    if not wanted.together:
        removed = [
            wanted.count_moves(one.site.q_heads, each, one.count_removable(wanted.empty))
            for one in layers
        ]
        for layer, count in zip(layers, removed, strict=True):
            _check_enough(count * each, [layer], wanted)
        left = min(layer.all - count for layer, count in zip(layers, removed, strict=True))
    elif wanted.count is not None:
        left = math.ceil((before - wanted.count / each) / len(layers) - _ROUNDING)
    else:
        exact = (1 - (wanted.amount or 0.0)) * before / len(layers)
        left = math.floor(exact + 0.5 + _ROUNDING)
        left = max(left, min(1, math.ceil(exact - _ROUNDING)))
    if left < 1:
        _check_enough(before * each, layers, wanted)
    if left > smallest:
        least = (before - smallest * len(layers)) * each
        raise ConfigError(
            wanted.key,
            f"leaves more than {smallest * each} heads per layer, but the smallest layer has only "
            "that many, and all layers must keep the same number",
            given=wanted.given,
            valid=f"{least / (before * each):g} or more of all heads ({least}), or uniform: false",
        )
    counts = [layer.all - left for layer in layers]
    for layer, count in zip(layers, counts, strict=True):
        _check_enough(count * each, [layer], wanted)
    return counts


def _find_common_step(layers: Sequence[_Layer], wanted: HeadCut) -> int:
    sizes = sorted({layer.each for layer in layers})
    if len(sizes) > 1:
        what = "groups of different sizes" if wanted.by_group else "different numbers of KV heads"
        raise ConfigError(
            f"{wanted.prefix}.uniform",
            f"the layers have {what}, and keep them under "
            f"cut={'groups' if wanted.by_group else 'queries'}",
            given=", ".join(map(str, sizes)),
            valid=f"uniform: false, or cut={'queries' if wanted.by_group else 'groups'}",
        )
    return sizes[0]


def _check_enough(heads: int, layers: Sequence[_Layer], wanted: HeadCut) -> None:
    """Check that `heads` heads can be removed from these layers."""
    most = sum(layer.count_removable(wanted.empty) * layer.each for layer in layers)
    if heads <= most:
        return
    unprotected = sum((layer.all - (not wanted.empty)) * layer.each for layer in layers)
    where = layers[0].site.path if len(layers) == 1 else "all layers"
    if heads <= unprotected:
        raise ConfigError(
            f"{wanted.prefix}.protect",
            f"leaves only {most} heads of {where} to remove, but {heads} should be removed",
            given=f"{wanted.key.rpartition('.')[2]}={wanted.given}",
            valid="fewer protected heads, or fewer heads to remove",
        )
    more = f", or {wanted.allow_empty}" if wanted.allow_empty else ""
    if wanted.empty or wanted.uniform:
        more = ""
    if wanted.allow_empty and wanted.by_group and any(layer.each > 1 for layer in layers):
        more += f", or {wanted.prefix}.cut=queries"
    raise ConfigError(
        wanted.key,
        "there are not that many heads"
        if wanted.empty
        else "a layer keeps at least one head (or one group of heads)",
        given=wanted.given,
        valid=f"at most {most} heads{more}",
    )
