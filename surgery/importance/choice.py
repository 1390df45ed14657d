"""Which heads go by their scores: a share or a number of them, the lowest first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from surgery.errors import ConfigError
from surgery.importance.score_file import HeadScores
from surgery.models.sites import Site

# Shares are products of decimals: 0.3 of 10 is 3, whatever the last bit of it says.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class HeadCut:
    """How many heads go, and how they are counted.

    Attributes:
        amount, count: the share of the heads or their number; one of them.
        together: counted over all layers, else in each.
        uniform: whether every layer ends with as many.
        by_group: whether whole KV groups go, else as many query heads of every group.
        empty: whether a layer may lose all.
        prefix: dotted config key of the options, for messages.
    """

    amount: float | None
    count: int | None
    together: bool = False
    uniform: bool = False
    by_group: bool = True
    empty: bool = False
    prefix: str = "heads"

    @property
    def key(self) -> str:
        return f"{self.prefix}.{'amount' if self.count is None else 'count'}"

    @property
    def given(self) -> float | None:
        return self.amount if self.count is None else self.count

    def of(self, heads: int, each: int, most: int) -> int:
        """How many times `each` heads go of `heads`.

        An amount is taken to the nearest whole number, a half down, and never over `most` by the
        rounding alone; a count is rounded down.
        """
        if self.count is not None:
            return self.count // each
        exact = (self.amount or 0.0) * heads / each
        nearest = math.ceil(exact - 0.5 - _ROUNDING)
        return min(nearest, max(most, math.floor(exact + _ROUNDING)))


@dataclass(frozen=True)
class _Layer:
    """A site's heads as they can go, the cheapest first.

    Attributes:
        moves: cost per head, and the heads that go at once.
        each: heads per move.
        all: moves it would have, were none of its heads protected.
    """

    site: Site
    moves: list[tuple[float, list[int]]]
    each: int
    all: int

    def most(self, empty: bool) -> int:
        return min(len(self.moves), self.all - (not empty))


def choose_heads(
    sites: Sequence[Site],
    scores: HeadScores,
    wanted: HeadCut,
    protected: Mapping[int, Sequence[int]] | None = None,
) -> dict[int, list[int]]:
    """The heads to remove: layer → query heads, ascending.

    What goes at once is a KV group with its query heads, or one query head of every group (of each
    the lowest that is left). Ties go to the lower layer and head. Where the groups of layers
    differ in size, they are compared by their score per head.

    Args:
        scores: of every site.
        protected: layer → query heads that stay; under `by_group` their groups do.

    Raises:
        ConfigError: as many cannot go.
    """
    layers = [
        _layer(site, scores, wanted.by_group, (protected or {}).get(site.layer, ()))
        for site in sites
    ]
    if wanted.uniform:
        counts = _uniform(layers, wanted)
    elif wanted.together:
        counts = _together(layers, wanted)
    else:
        counts = [
            wanted.of(layer.site.q_heads, layer.each, layer.most(wanted.empty)) for layer in layers
        ]
        for layer, count in zip(layers, counts, strict=True):
            _check(count * layer.each, [layer], wanted)
    return {
        layer.site.layer: sorted(head for _, heads in layer.moves[:count] for head in heads)
        for layer, count in zip(layers, counts, strict=True)
    }


def _layer(site: Site, scores: HeadScores, by_group: bool, protected: Sequence[int]) -> _Layer:
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
    found = heads
    ranked = [
        sorted((head for head in group if head not in stay), key=lambda h: (found[h], h))
        for group in groups
    ]
    moves = [
        (sum(found[head] for head in going) / len(groups), list(going))
        for going in zip(*ranked, strict=False)
    ]
    return _Layer(site, moves, site.kv_heads, size)


def _together(layers: Sequence[_Layer], wanted: HeadCut) -> list[int]:
    total = sum(layer.site.q_heads for layer in layers)
    sizes = {layer.each for layer in layers}
    each = sizes.pop() if len(sizes) == 1 else 1
    most = sum(layer.most(wanted.empty) * layer.each for layer in layers)
    left = each * wanted.of(total, each, most // each)
    _check(left, layers, wanted)
    # A layer's moves are taken in their order, so the cheapest is always some layer's next.
    ranked = sorted(
        (cost, number, place)
        for number, layer in enumerate(layers)
        for place, (cost, _) in enumerate(layer.moves[: layer.most(wanted.empty)])
    )
    counts = [0] * len(layers)
    for _, number, _ in ranked:
        if left >= layers[number].each:
            counts[number] += 1
            left -= layers[number].each
    return counts


def _uniform(layers: Sequence[_Layer], wanted: HeadCut) -> list[int]:
    """Moves per layer after which all have as many heads."""
    each = _equal_steps(layers, wanted)
    smallest = min(layer.all for layer in layers)
    before = sum(layer.all for layer in layers)
    if not wanted.together:
        gone = [wanted.of(one.site.q_heads, each, one.most(wanted.empty)) for one in layers]
        for layer, count in zip(layers, gone, strict=True):
            _check(count * each, [layer], wanted)
        left = min(layer.all - count for layer, count in zip(layers, gone, strict=True))
    elif wanted.count is not None:
        left = math.ceil((before - wanted.count / each) / len(layers) - _ROUNDING)
    else:
        exact = (1 - (wanted.amount or 0.0)) * before / len(layers)
        left = math.floor(exact + 0.5 + _ROUNDING)
        left = max(left, min(1, math.ceil(exact - _ROUNDING)))
    if left < 1:
        _check(before * each, layers, wanted)
    if left > smallest:
        least = (before - smallest * len(layers)) * each
        raise ConfigError(
            wanted.key,
            f"leaves more heads than the {smallest * each} that the smallest layer "
            "has, and all layers shall have as many",
            given=wanted.given,
            valid=f"{least / (before * each):g} or more of all heads ({least}), or uniform: false",
        )
    counts = [layer.all - left for layer in layers]
    for layer, count in zip(layers, counts, strict=True):
        _check(count * each, [layer], wanted)
    return counts


def _equal_steps(layers: Sequence[_Layer], wanted: HeadCut) -> int:
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


def _check(heads: int, layers: Sequence[_Layer], wanted: HeadCut) -> None:
    """Whether so many can go of these layers."""
    most = sum(layer.most(wanted.empty) * layer.each for layer in layers)
    if heads <= most:
        return
    unprotected = sum((layer.all - (not wanted.empty)) * layer.each for layer in layers)
    where = layers[0].site.path if len(layers) == 1 else "all layers"
    if heads <= unprotected:
        raise ConfigError(
            f"{wanted.prefix}.protect",
            f"lets {most} of the heads of {where} go, and {heads} should",
            given=f"{wanted.key.rpartition('.')[2]}={wanted.given}",
            valid="fewer protected heads, or fewer to remove",
        )
    more = "" if wanted.empty else f", or {wanted.prefix}.remove_attention=true"
    if wanted.uniform:
        more = ""
    raise ConfigError(
        wanted.key,
        "there are not so many heads"
        if wanted.empty
        else "a layer keeps at least one head (or group of them)",
        given=wanted.given,
        valid=f"at most {most} heads{more}",
    )
