"""Text that is held out together."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.calibration.folds import FOLDS, Folds

windows = st.lists(st.integers(0, 5), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(windows, st.integers(1, 4), st.integers(2, 9))
def test_equal_windows_lie_in_one_fold_and_every_fold_holds_some(
    which: list[int], size: int, length: int
) -> None:
    rows = torch.tensor(which)[:, None] + 7 * torch.arange(length)
    labels = torch.randn(len(which), length)
    batches = [
        {"input_ids": rows[at : at + size], "labels": labels[at : at + size]}
        for at in range(0, len(which), size)
    ]
    folds = Folds(batches)
    found = torch.cat([folds.get(number, length) for number in range(len(batches))])
    assert found.shape == rows.shape
    assert set(found.flatten().tolist()) == set(range(folds.count))
    if len(set(which)) == 1:
        assert folds.halves
        assert found[0].tolist() == [0] * (length // 2) + [1] * (length - length // 2)
        return
    assert folds.count == min(FOLDS, len(set(which)))
    assert bool((found == found[:, :1]).all())
    for window in set(which):
        assert len({int(f) for f, w in zip(found[:, 0], which, strict=True) if w == window}) == 1


def test_batches_are_held_out_whole_where_they_share_no_window() -> None:
    def make(*which: int) -> list[dict[str, torch.Tensor]]:
        return [{"input_ids": torch.tensor([[a, a + 1], [a + 2, a + 3]])} for a in which]

    assert Folds(make(*range(8))).hold_out(8) == []  # neighbours overlap in a row
    apart = Folds(make(*range(0, 80, 10)))
    assert apart.hold_out(8) == [6, 7]
    assert apart.hold_out(2) == [1]
    assert apart.hold_out(1) == []
    assert Folds(make(0, 10, 0)).hold_out(3) == []


def test_a_mask_tells_windows_apart_and_labels_do_not() -> None:
    ids = torch.ones(2, 4, dtype=torch.long)
    masks = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    assert Folds([{"input_ids": ids, "labels": torch.randn(2, 4)}]).halves
    assert not Folds([{"input_ids": ids, "attention_mask": masks}]).halves
