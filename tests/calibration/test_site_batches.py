"""By what errors are divided, position by position."""

from __future__ import annotations

import pytest
import torch

from surgery.calibration.site_batches import measure_size


def test_it_is_the_root_mean_square() -> None:
    stream = torch.tensor([[[3.0, 4.0], [30.0, 40.0]]])
    assert measure_size(stream).tolist() == [pytest.approx([12.5**0.5, 1250**0.5])]


def test_an_empty_position_does_not_count_for_all_others() -> None:
    stream = torch.ones(1, 4, 8)
    stream[0, 1] = 0
    least = measure_size(stream)[0]
    assert least[1] == pytest.approx(0.75e-3)
    assert least[0] == 1


def test_nothing_is_divided_by_zero() -> None:
    scale = 1 / measure_size(torch.zeros(1, 2, 8))
    assert torch.isfinite(scale.square()).all()
