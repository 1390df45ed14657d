"""The order of windows: a function of the batch's number and the seed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from surgery.data.sampler import ResumableSampler

SEEDS = st.integers(0, 2**31)


@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 9), SEEDS, st.integers(0, 3))
def test_ranks_share_an_epoch_evenly_and_without_overlap(
    size: int, world: int, batch_size: int, seed: int, epoch: int
) -> None:
    shares = []
    for rank in range(world):
        sampler = ResumableSampler(
            size,
            batch_size,
            seed,
            rank=rank,
            world=world,
            trained=lambda: epoch * (size // world // batch_size),
        )
        batches = list(sampler)
        assert len(batches) == len(sampler) == size // world // batch_size
        assert all(len(batch) == batch_size for batch in batches)
        shares.append([window for batch in batches for window in batch])
    together = [window for share in shares for window in share]
    assert len(set(together)) == len(together)
    assert set(together) <= set(range(size))


@given(st.integers(2, 40), st.integers(1, 5), SEEDS, st.integers(0, 100))
def test_going_on_from_any_batch_gives_the_same_batches(
    size: int, batch_size: int, seed: int, start: int
) -> None:
    batch_size = min(batch_size, size)
    straight: list[list[int]] = []
    sampler = ResumableSampler(size, batch_size, seed, trained=lambda: len(straight))
    while len(straight) < start + size:
        straight += list(sampler)
    resumed = list(ResumableSampler(size, batch_size, seed, trained=lambda: start))
    assert resumed == straight[start : start + len(resumed)]


def test_epochs_and_seeds_differ() -> None:
    orders = [
        tuple(ResumableSampler(100, 1, seed).order_windows(epoch))
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len(set(orders)) == 4
    assert all(sorted(order) == list(range(100)) for order in orders)


def test_one_rank_of_one_sees_every_window() -> None:
    sampler = ResumableSampler(12, 3, seed=5)
    assert sorted(window for batch in sampler for window in batch) == list(range(12))
