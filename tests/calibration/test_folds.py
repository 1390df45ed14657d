"""Text that is held out together."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.calibration.folds import FOLDS, GRAM, REPEATED, Folds


def cut(rows: torch.Tensor, size: int) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": part, "labels": torch.randn(part.shape)} for part in rows.split(size)]


def collect(folds: Folds, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    return torch.cat(
        [folds.get(number, batch["input_ids"].shape[1]) for number, batch in enumerate(batches)]
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(FOLDS, 70), st.integers(0, 99))
def test_text_that_repeats_nothing_is_cut_into_equal_runs(
    rows: int, size: int, length: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    batches = cut(torch.randperm(rows * length, generator=generator).view(rows, length), size)
    folds = Folds(batches)
    found = collect(folds, batches).flatten()
    assert folds.tokens == rows * length
    assert found.tolist() == sorted(found.tolist())
    counts = found.bincount()
    assert len(counts) == FOLDS
    assert int(counts.max() - counts.min()) <= 1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.integers(1, 3), st.integers(4, 70))
def test_windows_that_come_again_count_once(which: list[int], size: int, length: int) -> None:
    windows = torch.arange(4 * length).view(4, length)
    batches = cut(windows[which], size)
    folds = Folds(batches)
    found = collect(folds, batches)
    assert folds.tokens == len(set(which)) * length
    for place, window in enumerate(which):
        repeated = found[place] == REPEATED
        assert bool(repeated.all()) if window in which[:place] else not bool(repeated.any())


def test_text_that_goes_round_is_as_long_as_one_round() -> None:
    around = 50
    long = torch.arange(400) % around
    windows = torch.stack([long[start : start + 100] for start in (0, 7, 30)])
    batches = cut(windows, 2)
    folds = Folds(batches)
    assert folds.tokens == around + GRAM - 1  # with what comes before the first that is whole
    assert bool((collect(folds, batches)[0, around + GRAM :] == REPEATED).all())


def test_positions_without_tokens_go_row_by_row() -> None:
    pixels = [{"pixel_values": torch.randn(3, 4, 4)}, {"pixel_values": torch.randn(5, 4, 4)}]
    folds = Folds(pixels)
    rows = torch.cat([folds.get(number, 7) for number in (0, 1)])
    assert rows.tolist() == [[row * FOLDS // 8] * 7 for row in range(8)]
    alone = Folds([{"pixel_values": torch.randn(1, 4, 4)}])
    assert alone.get(0, 8).tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]]


def test_a_decoder_s_positions_are_cut_by_its_own_tokens() -> None:
    batch = {"input_ids": torch.arange(10)[None], "decoder_input_ids": torch.arange(6)[None]}
    folds = Folds([batch])
    assert folds.get(0, 6).tolist() == [[0, 0, 1, 2, 2, 3]]
    assert folds.get(0, 10).tolist() == [[0, 0, 0, 1, 1, 2, 2, 2, 3, 3]]
