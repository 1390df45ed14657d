"""The shared subspace against brute force, and shared values against everything else."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from surgery.operations.gqa.aligned import align_values
from surgery.operations.gqa.subspace import (
    NOISE,
    compute_least_loss,
    find_shared_subspace,
    find_top_subspace,
    solve_readers,
)
from surgery.operations.gqa.values import share_values
from tests.operations.gqa.drawing import F64


def covariance(size: int, rank: int, seed: int) -> Tensor:
    """Singular for a rank below the size; strengths differ a thousandfold."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(size, rank, generator=generator, dtype=F64)
    half = half * torch.logspace(0, -1.5, rank, dtype=F64)
    return half @ half.mT


def lost(shared: Tensor, covariances: list[Tensor], targets: list[Tensor]) -> float:
    """Σ_h E|T_h f_h - R_h M f_h|² with each R_h as good as it can be (pseudo-inverse)."""
    total = 0.0
    for c, target in zip(covariances, targets, strict=True):
        square = shared @ c @ shared.mT
        reader = target @ c @ shared.mT @ torch.linalg.pinv(square, hermitian=True, rtol=1e-11)
        left = target - reader @ shared
        total += float(torch.trace(left @ c @ left.mT))
    return total


def size_of(covariances: list[Tensor], targets: list[Tensor]) -> float:
    return sum(float(torch.trace(t @ c @ t.mT)) for c, t in zip(covariances, targets, strict=True))


def matrices(count: int, rows: int, size: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, rows, size, generator=generator, dtype=F64))


sizes = st.tuples(st.integers(1, 4), st.integers(1, 8), st.integers(1, 10), st.integers(0, 999))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sizes)
def test_the_top_subspace_loses_the_eigenvalues_below_it(case: tuple[int, ...]) -> None:
    width, extra, rank, seed = case
    size = width + extra
    c = covariance(size, rank, seed)
    (target,) = matrices(1, size, size, seed + 1)
    shared = find_top_subspace(target.mT @ target, c, width)
    # Any map loses what the best approximation of that rank loses (Eckart-Young), or more.
    values = torch.linalg.eigvalsh(target @ c @ target.mT).clamp_min(0)
    whole = float(values.sum())
    assert lost(shared, [c], [target]) == pytest.approx(
        float(values[:-width].sum()), abs=1e-7 * whole
    )
    assert compute_least_loss(target, c, width) == pytest.approx(
        float(values[:-width].sum()), abs=1e-9 * whole
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(sizes, st.integers(1, 5))
def test_rounds_never_lose_more_and_end_where_no_small_step_helps(
    case: tuple[int, ...], heads: int
) -> None:
    width, extra, rank, seed = case
    size = width + extra
    covariances = [covariance(size, rank, seed + h) for h in range(heads)]
    targets = matrices(heads, width + 1, size, seed + 50)
    whole = size_of(covariances, targets)
    losses = [
        find_shared_subspace(covariances, targets, width, rounds, 0.0)[2] for rounds in range(6)
    ]
    for before, after in pairwise(losses):
        assert after <= before + 1e-9
    shared, found, share = find_shared_subspace(covariances, targets, width, 10, 0.0)
    assert share * whole == pytest.approx(lost(shared, covariances, targets), abs=1e-6 * whole)
    assert -1e-9 <= share <= 1 + 1e-9
    assert all(one.isfinite().all() for one in (shared, *found))
    mean = sum(covariances) / heads  # type: ignore[arg-type]
    start = find_top_subspace(sum(t.mT @ t for t in targets), mean, width)  # type: ignore[arg-type]
    assert share * whole <= lost(start, covariances, targets) + 1e-6 * whole


def test_gradient_steps_from_there_gain_next_to_nothing() -> None:
    covariances = [covariance(8, 8, h) for h in range(4)]
    targets = matrices(4, 4, 8, 9)
    shared, _, _ = find_shared_subspace(covariances, targets, 3, rounds=200, noise=0.0)
    reached = lost(shared, covariances, targets)
    moving = shared.clone().requires_grad_()
    optimizer = torch.optim.Adam([moving], lr=1e-3)
    for _ in range(200):
        total = torch.zeros((), dtype=F64)
        for c, target in zip(covariances, targets, strict=True):
            reader = torch.linalg.solve(moving @ c @ moving.mT, moving @ c @ target.mT).mT
            left = target - reader @ moving
            total = total + torch.trace(left @ c @ left.mT)
        optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert reached <= float(total.detach()) * 1.05


def test_readers_are_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(300, 6, generator=generator, dtype=F64)
    shared, target = matrices(1, 2, 6, 1)[0], matrices(1, 4, 6, 2)[0]
    (found,) = solve_readers(shared, [samples.mT @ samples / 300], [target])
    expected = torch.linalg.lstsq(samples @ shared.mT, samples @ target.mT).solution.mT
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@st.composite
def value_groups(draw: st.DrawFn) -> tuple[dict[int, Tensor], dict[int, Tensor], dict[int, int]]:
    """Attended values, output projections and memberships of one group of KV heads."""
    members, readers_each = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    width, seed = draw(st.integers(1, 4)), draw(st.integers(0, 999))
    rank = draw(st.integers(1, members * width + 1))
    heads = draw(st.permutations(range(members * readers_each)))
    attended = {h: covariance(members * width, rank, seed + h) for h in heads}
    if draw(st.booleans()):  # a head that attends to nothing
        attended[heads[0]] = torch.zeros_like(attended[heads[0]])
    outputs = dict(zip(heads, matrices(len(heads), 6, width, seed), strict=True))
    if draw(st.booleans()):  # a head that nothing is read of
        outputs[heads[-1]] = torch.zeros_like(outputs[heads[-1]])
    return attended, outputs, {h: n // readers_each for n, h in enumerate(heads)}


def value_loss(case: tuple, value: Tensor, made: dict[int, Tensor]) -> float:
    attended, outputs, member_of = case
    total = 0.0
    for head, c in attended.items():
        width = outputs[head].shape[1]
        own = torch.eye(len(c), dtype=F64)[member_of[head] * width :][:width]
        left = outputs[head] @ own - made[head] @ value
        total += float(torch.trace(left @ c @ left.mT))
    return total


@settings(max_examples=60, deadline=None, derandomize=True)
@given(value_groups())
def test_shared_values_tell_their_loss_and_lose_no_more_than_aligned_or_mean_ones(
    case: tuple,
) -> None:
    attended, outputs, member_of = case
    members = max(member_of.values()) + 1
    found = share_values(attended, outputs, member_of, members, noise=0.0)
    assert found.value.isfinite().all()
    assert all(one.isfinite().all() for one in found.output.values())
    width = found.value.shape[0]
    whole = value_loss(
        case, torch.zeros_like(found.value), {h: torch.zeros_like(o) for h, o in outputs.items()}
    )
    optimal = value_loss(case, found.value, found.output)
    assert optimal == pytest.approx(found.loss * whole, abs=1e-6 * whole)
    aligned = align_values(sum(attended.values()) / len(attended), members)  # type: ignore[arg-type]
    turned = {h: o @ aligned.turns[member_of[h]].mT for h, o in outputs.items()}
    eye = torch.eye(width, dtype=F64)
    mean = torch.cat([eye] * members, dim=1) / members
    assert optimal <= value_loss(case, aligned.value, turned) + 1e-6 * whole
    assert optimal <= value_loss(case, mean, outputs) + 1e-6 * whole
    assert optimal <= 1.000001 * whole


@settings(max_examples=60, deadline=None, derandomize=True)
@given(value_groups())
def test_neither_do_they_under_the_noise_that_they_are_found_under(case: tuple) -> None:
    attended, outputs, member_of = case
    members = max(member_of.values()) + 1
    found = share_values(attended, outputs, member_of, members)
    mean = torch.stack(list(attended.values())).mean(0)
    noise = NOISE * mean.diagonal().max() * torch.eye(len(mean), dtype=F64)
    noisy = {head: c + noise for head, c in attended.items()}, outputs, member_of
    width = found.value.shape[0]
    whole = value_loss(
        noisy, torch.zeros_like(found.value), {h: torch.zeros_like(o) for h, o in outputs.items()}
    )
    aligned = align_values(mean, members)
    turned = {h: o @ aligned.turns[member_of[h]].mT for h, o in outputs.items()}
    pooled = torch.cat([torch.eye(width, dtype=F64)] * members, dim=1) / members
    lost = found.loss * whole
    assert lost <= value_loss(noisy, aligned.value, turned) + 1e-6 * whole
    assert lost <= value_loss(noisy, pooled, outputs) + 1e-6 * whole


def test_values_stay_as_large_as_they_were() -> None:
    attended = {h: covariance(8, 8, h) for h in range(2)}
    outputs = dict(enumerate(matrices(2, 6, 4, 3)))
    found = share_values(attended, outputs, {0: 0, 1: 1}, 2, noise=0.0)
    mean = (attended[0] + attended[1]) / 2
    made = float(torch.trace(found.value @ mean @ found.value.mT))
    assert made == pytest.approx(float(mean.trace()) / 2, rel=1e-6)


def test_everything_zero_is_no_accident() -> None:
    zero = torch.zeros(4, 4, dtype=F64)
    outputs = {h: torch.ones(6, 2, dtype=F64) for h in range(2)}
    found = share_values({0: zero, 1: zero}, outputs, {0: 0, 1: 1}, 2)
    assert found.loss == pytest.approx(0, abs=1e-9)
    assert found.value.isfinite().all()
    assert all(one.isfinite().all() for one in found.output.values())


def test_features_that_hardly_vary_are_not_blown_up() -> None:
    """What rounding leaves in a null space is explained by nothing, least of all at any price."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(64, 32, generator=generator, dtype=F64)  # 64 features of 32 causes
    attended = {}
    for head in range(4):
        causes = torch.randn(500, 32, generator=generator, dtype=F64) + head
        rounded = (causes @ mixing.mT).float().double()
        rounded = rounded + 1e-7 * torch.randn(rounded.shape, generator=generator, dtype=F64)
        attended[head] = rounded.mT @ rounded / 500
    outputs = dict(enumerate(matrices(4, 32, 16, 1)))
    found = share_values(attended, outputs, {h: h for h in range(4)}, 4, noise=0.0)
    assert float(found.value.abs().max()) < 100
    assert max(float(one.abs().max()) for one in found.output.values()) < 100
    assert 0 < found.loss < 1
