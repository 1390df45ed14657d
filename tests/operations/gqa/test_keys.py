"""Shared keys: what they lose, and that no other keys lose less."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from surgery.operations.gqa.aligned import align_keys
from surgery.operations.gqa.keys import KeyMoments, SharedKeys, compute_group_loss, share_keys
from surgery.operations.gqa.planes import make_half_split, make_interleaved
from tests.operations.gqa.drawing import F64, Drawn, drawn, features, moments_of, rotations


def lost(moments: KeyMoments, group: list[int], keys: Tensor, queries: list[Tensor]) -> float:
    """E|logit error|² of a group that shares `keys`, by its definition.

    A logit is q^T R k for a rotation R by the angle of two positions, which is averaged over; keys
    and queries are taken as independent.
    """
    layout, size = moments.layout, moments.layout.size
    total = 0.0
    angles = torch.linspace(0, 2 * torch.pi, 9, dtype=F64)[:-1, None].expand(-1, len(layout.pairs))
    covariance = dense_covariance(moments, group)
    for place, member in enumerate(group):
        own = torch.eye(len(group) * size, dtype=F64)[place * size :][:size]
        read = dense_metric(moments, member)
        for turned in rotations(layout, angles):
            # q^T R own k - (Q q)^T R keys k, as a form in q and the stacked k
            error = turned @ own - queries[place].mT @ turned @ keys
            total += float(torch.trace(error.mT @ read @ error @ covariance)) / len(angles)
    return total


def dense_covariance(moments: KeyMoments, group: list[int]) -> Tensor:
    """A covariance of the stacked keys with these moments, whatever they do not tell left out."""
    layout, size = moments.layout, moments.layout.size
    made = torch.zeros(len(group), size, len(group), size, dtype=F64)
    for n, one in enumerate(group):
        for m, two in enumerate(group):
            for plane, (a, b) in enumerate(layout.pairs):
                z = moments.planes[plane, one, two] / 2
                made[n, a, m, a] = made[n, b, m, b] = z.real
                made[n, b, m, a], made[n, a, m, b] = z.imag, -z.imag
            width = len(layout.free)
            for i, a in enumerate(layout.free):
                for j, b in enumerate(layout.free):
                    made[n, a, m, b] = moments.free[one * width + i, two * width + j]
    return made.flatten(2).flatten(0, 1)


def dense_metric(moments: KeyMoments, member: int) -> Tensor:
    layout = moments.layout
    made = torch.zeros(layout.size, layout.size, dtype=F64)
    for plane, (a, b) in enumerate(layout.pairs):
        made[a, a] = made[b, b] = moments.power[plane, member] / 2
    for i, a in enumerate(layout.free):
        for j, b in enumerate(layout.free):
            made[a, b] = moments.metric[member, i, j]
    return made


def best_queries(moments: KeyMoments, group: list[int], keys: Tensor) -> list[Tensor]:
    """For given shared keys, the allowed queries that lose least: plane by plane a regression."""
    layout, size = moments.layout, moments.layout.size
    covariance = dense_covariance(moments, group)
    across, square = covariance @ keys.mT, keys @ covariance @ keys.mT
    found = []
    for place in range(len(group)):
        own = across[place * size :][:size]
        made = torch.zeros(size, size, dtype=F64)
        for a, b in layout.pairs:
            power = (square[a, a] + square[b, b]).clamp_min(1e-300)
            real, imaginary = own[a, a] + own[b, b], own[b, a] - own[a, b]
            made[a, a] = made[b, b] = real / power
            made[b, a], made[a, b] = imaginary / power, -imaginary / power
        free = list(layout.free)
        if free:
            at = torch.tensor(free)
            inside = square[at[:, None], at]
            made[at[:, None], at] = own[at[:, None], at] @ torch.linalg.pinv(
                inside, hermitian=True, rtol=1e-10
            )
        found.append(made.mT)
    return found


def scale(moments: KeyMoments) -> float:
    return max(moments.compute_total(), 1e-12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(drawn())
def test_the_loss_it_tells_is_the_loss_there_is(case: Drawn) -> None:
    group = list(range(case.keys.shape[1]))
    found = share_keys(case.moments, group)
    actual = lost(case.moments, group, found.key, found.query)
    assert actual == pytest.approx(found.loss, abs=1e-6 * scale(case.moments))
    assert compute_group_loss(case.moments, group) == pytest.approx(
        found.loss, abs=1e-9 * scale(case.moments)
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(drawn())
def test_aligned_and_mean_keys_lose_no_less_whatever_their_queries(case: Drawn) -> None:
    group, size = list(range(case.keys.shape[1])), case.layout.size
    optimal = share_keys(case.moments, group).loss
    aligned = align_keys(case.moments, group)
    eye = torch.eye(size, dtype=F64)
    mean = SharedKeys(torch.cat([eye] * len(group), dim=1) / len(group), [eye] * len(group), 0.0)
    for other in (aligned, mean):
        slack = 1e-6 * scale(case.moments)
        assert optimal <= lost(case.moments, group, other.key, other.query) + slack
        best = best_queries(case.moments, group, other.key)
        assert optimal <= lost(case.moments, group, other.key, best) + slack


@settings(max_examples=30, deadline=None, derandomize=True)
@given(drawn(), st.integers(0, 99))
def test_no_step_away_loses_less(case: Drawn, seed: int) -> None:
    group = list(range(case.keys.shape[1]))
    found = share_keys(case.moments, group)
    layout = case.layout
    generator = torch.Generator().manual_seed(seed)
    for size in (0.3, 0.01):
        factors = torch.randn(
            len(layout.pairs), len(group), generator=generator, dtype=torch.complex128
        )
        width = len(layout.free)
        free = torch.randn(width, len(group) * width, generator=generator, dtype=F64)
        step = layout.to_dense(factors, free)
        keys = found.key + size * step * found.key.norm() / step.norm()
        other = lost(case.moments, group, keys, best_queries(case.moments, group, keys))
        assert other >= found.loss - 1e-6 * scale(case.moments)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(drawn())
def test_everything_is_finite_and_commutes_with_positions(case: Drawn) -> None:
    group, size = list(range(case.keys.shape[1])), case.layout.size
    angles = torch.tensor([[0.3 + plane for plane in range(len(case.layout.pairs))]], dtype=F64)
    (turned,) = rotations(case.layout, angles)
    for found in (share_keys(case.moments, group), align_keys(case.moments, group)):
        for block in (*found.key.split(size, dim=1), *found.query):
            assert block.isfinite().all()
            # The free block is turned by nothing, and nothing leaks between it and the planes.
            torch.testing.assert_close(turned @ block, block @ turned, rtol=1e-9, atol=1e-9)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(drawn())
def test_a_head_by_itself_keeps_every_logit(case: Drawn) -> None:
    for head in range(case.keys.shape[1]):
        found = share_keys(case.moments, [head])
        assert found.loss <= 1e-9 * scale(case.moments)
        assert lost(case.moments, [head], found.key, found.query) <= 1e-8 * scale(case.moments)


@pytest.mark.parametrize(
    "layout", [make_half_split(6, 6), make_interleaved(6, 4), make_half_split(6, 0)]
)
def test_the_order_of_the_members_does_not_matter(layout: object) -> None:
    keys, queries = features(4, 6, 20, 1), features(4, 6, 12, 2)
    moments = moments_of(layout, keys, queries)  # type: ignore[arg-type]
    losses = [share_keys(moments, group).loss for group in ([0, 1, 2], [2, 0, 1])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0] > 0


@settings(max_examples=40, deadline=None, derandomize=True)
@given(drawn())
def test_keys_stay_as_large_as_they_were(case: Drawn) -> None:
    """So that queries do, and half precision serves both."""
    group = list(range(case.keys.shape[1]))
    found = share_keys(case.moments, group)
    covariance = dense_covariance(case.moments, group)
    source = float(covariance.trace()) / len(group)
    made = float(torch.trace(found.key @ covariance @ found.key.mT))
    assert made <= 10 * len(group) * source + 1e-12
