"""The refit against least squares on the rows themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from surgery.calibration.output_moments import OutputMoments

CPU = torch.device("cpu")


def rows(seed: int = 0, count: int = 200, width: int = 6, outputs: int = 4) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, width, generator=generator) @ torch.randn(
        width, width, generator=generator
    )
    targets = inputs @ torch.randn(width, outputs, generator=generator) + 0.7
    return inputs, targets + torch.randn(count, outputs, generator=generator)


def moments_of(inputs: Tensor, targets: Tensor, *cuts: int) -> OutputMoments:
    moments = OutputMoments(inputs.shape[1], targets.shape[1], CPU)
    for x, y in zip(inputs.tensor_split(cuts), targets.tensor_split(cuts), strict=True):
        moments.add(x, y)
    return moments


@pytest.mark.parametrize("bias", [True, False])
def test_without_a_ridge_it_is_least_squares(bias: bool) -> None:
    inputs, targets = rows()
    wide = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1) if bias else inputs
    expected = torch.linalg.lstsq(wide.double(), targets.double()).solution
    start = torch.zeros(4, 6, dtype=torch.float64)
    made, made_bias = moments_of(inputs, targets).solve(start, start[:, 0] if bias else None, 1e-12)
    torch.testing.assert_close(made, expected[:6].mT, rtol=1e-4, atol=1e-4)
    assert (made_bias is None) == (not bias)
    if made_bias is not None:
        torch.testing.assert_close(made_bias, expected[6], rtol=1e-4, atol=1e-4)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 99), st.floats(1e-4, 10.0), st.booleans())
def test_a_ridge_is_least_squares_with_rows_that_hold_to_what_is_there(
    seed: int, ridge: float, bias: bool
) -> None:
    inputs, targets = rows(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    start = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    wide = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1).double()[:, : 7 if bias else 6]
    now = start[:, : wide.shape[1]]
    pull = (ridge * float((inputs.double() ** 2).sum(0).mean())) ** 0.5
    eye = pull * torch.eye(wide.shape[1], dtype=torch.float64)
    expected = torch.linalg.lstsq(
        torch.cat([wide, eye]), torch.cat([targets.double(), eye @ now.mT])
    ).solution.mT
    made, made_bias = moments_of(inputs, targets).solve(
        start[:, :6], start[:, 6] if bias else None, ridge
    )
    found = made if made_bias is None else torch.cat([made, made_bias[:, None]], dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_much_ridge_leaves_what_is_there_and_little_data_too() -> None:
    inputs, targets = rows()
    start = torch.arange(24.0, dtype=torch.float64).view(4, 6)
    made, _ = moments_of(inputs, targets).solve(start, None, 1e9)
    torch.testing.assert_close(made, start, rtol=1e-6, atol=1e-6)
    # One row moves the weight along itself alone.
    made, _ = moments_of(inputs[:1], targets[:1]).solve(start, None, 1e-3)
    moved = made - start
    away = torch.linalg.qr(inputs[:1].mT.double(), mode="complete").Q[:, 1:]
    assert (moved @ away).abs().max() < 1e-4 * moved.abs().max()


def test_how_the_rows_come_in_does_not_matter() -> None:
    inputs, targets = rows()
    start = torch.zeros(4, 6, dtype=torch.float64)
    whole, _ = moments_of(inputs, targets).solve(start, None, 1e-3)
    parts, _ = moments_of(inputs, targets, 1, 70, 71).solve(start, None, 1e-3)
    torch.testing.assert_close(whole, parts, rtol=1e-3, atol=1e-4)


def test_sums_do_not_grow_with_the_rows_and_a_solve_leaves_them() -> None:
    moments = moments_of(*rows(count=10))
    shapes = moments.square.shape, moments.across.shape
    moments.add(*rows(count=500))
    assert (moments.square.shape, moments.across.shape) == shapes == ((7, 7), (7, 4))
    before = moments.square.clone(), moments.across.clone()
    start = torch.zeros(4, 6, dtype=torch.float64)
    moments.solve(start, start[:, 0], 1e-3)
    assert torch.equal(moments.square, before[0])
    assert torch.equal(moments.across, before[1])


def test_inputs_that_are_always_zero_keep_their_weights() -> None:
    inputs, targets = rows()
    inputs[:, 2] = 0.0
    start = torch.full((4, 6), 3.0, dtype=torch.float64)
    made, _ = moments_of(inputs, targets).solve(start, None, 1e-3)
    torch.testing.assert_close(made[:, 2], start[:, 2])
    assert made.isfinite().all()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 99), st.sets(st.integers(0, 5), min_size=1, max_size=5))
def test_columns_that_go_are_made_up_for_by_the_others(seed: int, gone: set[int]) -> None:
    inputs, missing = rows(seed)
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed + 1))
    columns, kept = torch.tensor(sorted(gone)), [n for n in range(6) if n not in gone]
    found = moments_of(inputs, missing).drop(columns, weight)
    expected = moments_of(inputs[:, kept], missing + inputs[:, columns] @ weight[:, columns].mT)
    assert found.rows == expected.rows
    for name in ("square", "across", "size"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-3
        )
