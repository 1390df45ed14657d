"""Which text the gradient steps of a merge see, and which judges them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from surgery.calibration.folds import Folds
from surgery.calibration.view import Aim, KeptBatch
from surgery.operations.gqa.refine import _split

LENGTH = 6
WINDOWS = [{"input_ids": torch.arange(n, n + LENGTH)[None]} for n in range(0, 40, 10)]


def keep(*real: Sequence[int] | None) -> list[KeptBatch]:
    aim = Aim(torch.zeros(1, LENGTH, 2), torch.ones(1, LENGTH))
    return [
        KeptBatch((), {}, aim, None if one is None else mask(one), (None, None)) for one in real
    ]


def mask(positions: Sequence[int]) -> torch.Tensor:
    return torch.tensor([[n in positions for n in range(LENGTH)]])


def list_real(part: Sequence[KeptBatch]) -> list[list[int]]:
    found = []
    for one in part:
        assert one.real is not None
        found.append(one.real[0].nonzero().flatten().tolist())
    return found


def split(kept: list[KeptBatch], windows: list[dict[str, torch.Tensor]]) -> list[list[list[int]]]:
    return [list_real(part) for part in _split(kept, Folds(windows))]


def test_the_last_quarter_is_held_out() -> None:
    every = list(range(LENGTH))
    assert split(keep(None, None, None, None), WINDOWS) == [[every] * 3, [every]]
    assert split(keep(None, None), WINDOWS) == [[every, [0, 1, 2]], [[3, 4, 5]]]
    assert split(keep(None), WINDOWS) == [[[0, 1, 2, 3, 4]], [[5]]]


def test_padding_does_not_count() -> None:
    assert split(keep([2, 3, 4], None), WINDOWS) == [[[2, 3, 4], [0, 1, 2, 3]], [[4, 5]]]


def test_windows_that_come_again_are_in_neither_part() -> None:
    again = [WINDOWS[0], WINDOWS[1], WINDOWS[0]]
    assert split(keep(None, None, None), again) == split(keep(None, None), WINDOWS)


def test_a_single_position_is_not_fitted() -> None:
    assert split(keep([4]), WINDOWS) == [[], [[4]]]
    kept = keep([])
    assert _split(kept, Folds(WINDOWS)) == ([], kept)
