"""The ridge that is best on other text, against solutions that are made and tried one by one."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from surgery.calibration.output_moments import OutputMoments, sum_moments
from surgery.calibration.ridge import RIDGES, choose_ridge

WIDTH, OUTPUTS = 12, 5


def make_folds(
    seed: int, counts: list[int], signal: float
) -> tuple[list[OutputMoments], list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator)
    truth = signal * torch.randn(WIDTH, OUTPUTS, generator=generator)
    texts, folds = [], []
    for count in counts:
        inputs = torch.randn(count, WIDTH, generator=generator) @ mixing
        targets = inputs @ truth + torch.randn(count, OUTPUTS, generator=generator)
        moments = OutputMoments(WIDTH, OUTPUTS, torch.device("cpu"))
        moments.add(inputs, targets)
        texts.append((inputs, targets))
        folds.append(moments)
    return folds, texts


def try_ridge(
    folds: list[OutputMoments], texts: list[tuple[Tensor, Tensor]], ridge: float, bias: bool
) -> list[float]:
    """Fit on all folds but one, and look at that one: what is left of its targets."""
    left = []
    nothing = torch.zeros(OUTPUTS, WIDTH, dtype=torch.float64)
    for held, (inputs, targets) in enumerate(texts):
        others = [fold for place, fold in enumerate(folds) if place != held]
        weight, shift = sum_moments(others).solve(nothing, nothing[:, 0] if bias else None, ridge)
        made = inputs.double() @ weight.mT + (0 if shift is None else shift)
        left.append(float((targets.double() - made).square().sum()))
    return left


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(0, 99),
    st.lists(st.integers(1, 30), min_size=2, max_size=4),
    st.sampled_from([0.0, 0.05, 1.0]),
    st.booleans(),
)
def test_it_is_the_largest_that_is_as_good_as_the_best_tried_one_by_one(
    seed: int, counts: list[int], signal: float, bias: bool
) -> None:
    folds, texts = make_folds(seed, counts, signal)
    some = RIDGES[::4]
    tried = [try_ridge(folds, texts, ridge, bias) for ridge in some]
    found = choose_ridge(folds, some, bias=bias)
    chosen = some.index(found.ridge)
    size = sum(float(targets.double().square().sum()) for _, targets in texts)
    assert found.left == pytest.approx(sum(tried[chosen]) / size, rel=1e-3)
    best = min(range(len(some)), key=lambda place: sum(tried[place]))
    alike = [best]
    for place in range(best + 1, len(some)):
        over = [a - b for a, b in zip(tried[place], tried[best], strict=True)]
        if sum(over) <= statistics.stdev(over) * len(over) ** 0.5:
            alike.append(place)
    assert chosen in (max(alike), max(alike) - 1, max(alike) + 1)  # where it is a close call


def test_few_rows_of_noise_ask_for_much_ridge_and_many_of_a_signal_for_little() -> None:
    noise, _ = make_folds(0, [10, 10], 0.0)
    signal, _ = make_folds(0, [500, 500], 1.0)
    assert choose_ridge(noise, RIDGES, bias=False).left > 0.95
    assert choose_ridge(noise, RIDGES, bias=False).ridge > 3
    assert choose_ridge(signal, RIDGES, bias=False).ridge < 0.01


def test_without_a_ridge_and_with_few_rows_the_error_is_a_number() -> None:
    folds, _ = make_folds(0, [4, 4], 0.0)
    assert 1 < choose_ridge(folds, [0.0], bias=False).left < float("inf")


def test_a_part_that_says_nothing_changes_nothing() -> None:
    folds, _ = make_folds(0, [20, 30], 0.1)
    empty = OutputMoments(WIDTH, OUTPUTS, torch.device("cpu"))
    found = choose_ridge([*folds, empty], RIDGES, bias=True)
    assert found.ridge == choose_ridge(folds, RIDGES, bias=True).ridge


def test_without_rows_or_with_one_fold_nothing_can_be_told() -> None:
    empty = OutputMoments(WIDTH, OUTPUTS, torch.device("cpu"))
    assert choose_ridge([empty, empty], RIDGES, bias=True).left == 1.0
    (alone, _), _ = make_folds(0, [20, 1], 1.0)
    assert choose_ridge([alone], RIDGES, bias=True).left == 1.0
