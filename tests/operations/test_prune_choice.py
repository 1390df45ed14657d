"""The chooser against one that looks at every set of heads that could go."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.errors import ConfigError
from surgery.importance.choice import HeadCut, choose_heads
from surgery.importance.score_file import HeadScores
from surgery.models.sites import Site, find_sites
from tests.operations.zoo_models import build

SITE = find_sites(build("causal-lm", "llama")).sites[0]


def site(layer: int, kv_heads: int, size: int) -> Site:
    return replace(SITE, layer=layer, path=f"{layer}", q_heads=kv_heads * size, kv_heads=kv_heads)


@dataclass(frozen=True)
class Question:
    sites: list[Site]
    heads: dict[int, list[int]]
    groups: dict[int, list[int]] | None
    protected: dict[int, list[int]]
    by_group: bool
    together: bool
    uniform: bool
    empty: bool
    amount: float | None
    count: int | None

    def answer(self) -> dict[int, list[int]]:
        wanted = HeadCut(
            self.amount,
            self.count,
            together=self.together,
            uniform=self.uniform,
            by_group=self.by_group,
            empty=self.empty,
        )
        return choose_heads(self.sites, HeadScores(self.heads, self.groups), wanted, self.protected)

    def step(self, site: Site) -> int:
        return site.group_size if self.by_group else site.kv_heads

    def cost(self, removed: dict[int, list[int]]) -> int:
        if not self.by_group or self.groups is None:
            return sum(
                self.heads[layer][head] for layer, going in removed.items() for head in going
            )
        size = self.sites[0].group_size
        return sum(
            self.groups[layer][group]
            for layer, going in removed.items()
            for group in {head // size for head in going}
        )

    def sets(self, site: Site) -> Iterator[list[int]]:
        """Everything that one layer may lose."""
        stay, size = set(self.protected.get(site.layer, [])), site.group_size
        for bits in itertools.product([0, 1], repeat=site.q_heads):
            going = [head for head, bit in enumerate(bits) if bit]
            per_group = [
                sum(head // size == group for head in going) for group in range(site.kv_heads)
            ]
            if stay & set(going) or (len(going) == site.q_heads and not self.empty):
                continue
            whole = all(n in (0, size) for n in per_group)
            if whole if self.by_group else len(set(per_group)) == 1:
                yield going

    def numbers(self) -> list[int] | int | None:
        """Heads that go: of each layer, or of all; ``None`` where that cannot be."""
        steps = [self.step(site) for site in self.sites]
        alls = [site.q_heads // step for site, step in zip(self.sites, steps, strict=True)]
        free = [
            max(len(one) for one in self.sets(site)) // step
            for site, step in zip(self.sites, steps, strict=True)
        ]
        if self.uniform:
            each = self._uniform(alls, free)
            return None if each is None else [n * steps[0] for n in each]
        if self.together:
            number = self._nearest(sum(alls), sum(free), steps[0])
            return None if number is None else number * steps[0]
        found = [self._nearest(*one) for one in zip(alls, free, steps, strict=True)]
        return None if None in found else [n * s for n, s in zip(found, steps, strict=True)]

    def _uniform(self, alls: list[int], free: list[int]) -> list[int] | None:
        step, layers = self.step(self.sites[0]), len(alls)
        if self.together and self.count is not None:
            lefts = [n for n in range(1, 99) if (sum(alls) - n * layers) * step <= self.count]
            left = min(lefts)
            if sum(alls) * step - self.count <= 0:
                return None
        elif self.together:
            gone = Fraction(str(self.amount)) * sum(alls)
            if gone == sum(alls):
                return None
            left = min(range(1, 99), key=lambda n: (abs(sum(alls) - n * layers - gone), -n))
        else:
            keeps = [
                a if (n := self._nearest(a, f, step)) is None else a - n
                for a, f in zip(alls, free, strict=True)
            ]
            left = min(keeps)
            if any(self._nearest(*one, step) is None for one in zip(alls, free, strict=True)):
                return None
        gone_each = [one - left for one in alls]
        return gone_each if all(0 <= n <= f for n, f in zip(gone_each, free, strict=True)) else None

    def _nearest(self, every: int, free: int, step: int) -> int | None:
        if self.count is not None:
            return self.count // step if self.count // step <= free else None
        exact = Fraction(str(self.amount)) * every
        if math.floor(exact) > free:
            return None
        return min(range(free + 1), key=lambda n: (abs(n - exact), n))

    def cheapest(self, numbers: list[int] | int) -> int:
        costs = []
        for sets in itertools.product(*(list(self.sets(site)) for site in self.sites)):
            removed = {site.layer: going for site, going in zip(self.sites, sets, strict=True)}
            lengths = [len(going) for going in sets]
            if (sum(lengths) if isinstance(numbers, int) else lengths) == numbers:
                costs.append(self.cost(removed))
        return min(costs)


@st.composite
def questions(draw: st.DrawFn) -> Question:
    by_group, uniform = draw(st.booleans()), draw(st.booleans())
    size = draw(st.integers(1, 2))
    sites = []
    for layer in range(draw(st.integers(1, 3))):
        if by_group:
            sites.append(site(layer, draw(st.integers(1, 4 // size)), size))
        else:
            sites.append(site(layer, size, draw(st.integers(1, 4 // size))))
    score = st.integers(-3, 9)
    heads = {s.layer: draw(st.lists(score, min_size=s.q_heads, max_size=s.q_heads)) for s in sites}
    groups = None
    if draw(st.booleans()):
        groups = {
            s.layer: draw(st.lists(score, min_size=s.kv_heads, max_size=s.kv_heads)) for s in sites
        }
    protected = {s.layer: draw(st.lists(st.integers(0, s.q_heads - 1), max_size=2)) for s in sites}
    if draw(st.booleans()):
        protected = {}
    counted = draw(st.booleans())
    amount = draw(st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0]))
    return Question(
        sites,
        heads,
        groups,
        protected,
        by_group,
        draw(st.booleans()),
        uniform,
        not uniform and draw(st.booleans()),
        None if counted else amount,
        draw(st.integers(0, 9)) if counted else None,
    )


@settings(max_examples=250, deadline=None)
@given(questions())
def test_no_set_of_as_many_heads_is_cheaper(question: Question) -> None:
    numbers = question.numbers()
    if numbers is None:
        with pytest.raises(ConfigError) as caught:
            question.answer()
        assert caught.value.key.rpartition(".")[2] in ("amount", "count", "protect")
        assert caught.value.key.endswith("protect") <= any(question.protected.values())
        return
    found = question.answer()
    for one in question.sites:
        assert found[one.layer] in list(question.sets(one))
    lengths = [len(found[one.layer]) for one in question.sites]
    assert (sum(lengths) if isinstance(numbers, int) else lengths) == numbers
    assert question.cost(found) == question.cheapest(numbers)
    if question.uniform:
        assert len({one.q_heads - n for one, n in zip(question.sites, lengths, strict=True)}) == 1


def test_forty_percent_of_thirty_two_is_thirteen() -> None:
    sites = [site(layer, 8, 1) for layer in range(4)]
    scores = HeadScores({layer: list(range(8)) for layer in range(4)})
    found = choose_heads(sites, scores, HeadCut(0.4, None, together=True))
    assert sum(map(len, found.values())) == 13
    assert {len(heads) for heads in choose_heads(sites, scores, HeadCut(0.4, None)).values()} == {3}
    even = choose_heads(sites, scores, HeadCut(0.4, None, together=True, uniform=True))
    assert even == {n: [0, 1, 2] for n in range(4)}


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("together", [True, False])
def test_a_half_goes_down(uniform: bool, together: bool) -> None:
    sites = [site(0, 8, 1), site(1, 8, 1)]
    scores = HeadScores({layer: list(range(8)) for layer in range(2)})
    share = 0.3125 if uniform or not together else 0.28125  # 2.5 of 8, or 4.5 of 16
    found = choose_heads(sites, scores, HeadCut(share, None, together=together, uniform=uniform))
    assert found == {0: [0, 1], 1: [0, 1]}


def test_groups_of_different_sizes_are_compared_by_head() -> None:
    sites = [site(0, 2, 4), site(1, 2, 2)]
    scores = HeadScores(None, {0: [5.0, 9.0], 1: [3.0, 9.0]})  # 1.25 a head, and 1.5
    assert choose_heads(sites, scores, HeadCut(None, 4, together=True)) == {0: [0, 1, 2, 3], 1: []}
    # What is left over when no other group is small enough stays.
    assert choose_heads(sites, scores, HeadCut(None, 5, together=True)) == {0: [0, 1, 2, 3], 1: []}
    with pytest.raises(ConfigError, match="groups of different sizes") as caught:
        choose_heads(sites, scores, HeadCut(0.5, None, uniform=True, prefix="mine"))
    assert caught.value.key == "mine.uniform"


def test_too_few_to_become_equal() -> None:
    sites = [site(0, 4, 1), site(1, 2, 1)]
    scores = HeadScores({0: [1, 2, 3, 4], 1: [1, 2]})
    even = choose_heads(sites, scores, HeadCut(0.4, None, together=True, uniform=True))
    assert even == {0: [0, 1], 1: []}  # 2 of 6
    with pytest.raises(
        ConfigError, match="more than 2 heads per layer, but the smallest layer has only"
    ) as caught:
        choose_heads(sites, scores, HeadCut(0.1, None, together=True, uniform=True, prefix="mine"))
    assert caught.value.key == "mine.amount"
    assert "0.333333 or more of all heads (2)" in str(caught.value.valid)
