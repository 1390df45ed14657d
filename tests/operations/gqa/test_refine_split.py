"""Which text the gradient steps of a merge see, and which judges them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from surgery.calibration.folds import Folds
from surgery.calibration.view import KeptBatch
from surgery.operations.gqa.refine import _split

LENGTH = 6
WINDOWS = [{"input_ids": torch.arange(n, n + LENGTH)[None]} for n in range(0, 40, 10)]


def keep(*real: Sequence[int] | None) -> list[KeptBatch]:
    return [
        KeptBatch(
            (), {}, torch.zeros(1, LENGTH, 2), None if one is None else mask(one), (None, None)
        )
        for one in real
    ]


def mask(positions: Sequence[int]) -> torch.Tensor:
    return torch.tensor([[n in positions for n in range(LENGTH)]])


def list_real(part: Sequence[KeptBatch]) -> list[list[int]]:
    found = []
    for one in part:
        assert one.real is not None
        found.append(one.real[0].nonzero().flatten().tolist())
    return found


def test_whole_windows_are_held_out_where_there_are_several() -> None:
    kept = keep(None, None, None, None)
    assert _split(kept, Folds(WINDOWS)) == (kept[:3], kept[3:])


def test_of_one_kept_window_the_last_positions_are_held_out() -> None:
    fitted, held = _split(keep(None), Folds(WINDOWS))
    assert (list_real(fitted), list_real(held)) == ([[0, 1, 2]], [[3, 4, 5]])
    fitted, held = _split(keep([2, 3, 4]), Folds(WINDOWS))
    assert (list_real(fitted), list_real(held)) == ([[2]], [[3, 4]])


def test_where_nothing_can_be_held_out_nothing_is_fitted() -> None:
    kept = keep([4, 5])
    assert _split(kept, Folds(WINDOWS)) == ([], kept)
    assert _split(kept, Folds(WINDOWS[:1])) == ([], kept)
