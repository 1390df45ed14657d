"""Sums per head become weighted means, whatever the order and the sizes of what was added."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.observe.head_sums import HeadSums

CPU = torch.device("cpu")
quick = settings(deadline=None, max_examples=60)


@quick
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 2**31))
def test_means_are_over_all_that_was_added(sizes: list[int], seed: int) -> None:
    values = torch.randn(sum(sizes), 3, generator=torch.Generator().manual_seed(seed))
    sums = HeadSums(("a", "b"))
    for part in values.split(sizes):
        weight = torch.tensor(float(len(part)))
        sums.add("x", {"a": (part.sum(0), weight), "b": (2 * part.sum(0), weight.expand(3))})
    means = sums.summarize()["x"]
    torch.testing.assert_close(means["a"], values.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(means["b"], 2 * values.mean(0), atol=1e-5, rtol=1e-5)


def test_sites_may_differ_in_their_number_of_heads() -> None:
    sums = HeadSums(("a",))
    sums.add("x", {"a": (torch.ones(3), torch.tensor(2.0))})
    sums.add("y", {"a": (torch.ones(5), torch.tensor(4.0))})
    assert sums.summarize()["x"]["a"].tolist() == [0.5] * 3
    assert sums.summarize()["y"]["a"].tolist() == [0.25] * 5


def test_a_site_that_was_only_started_has_no_mean() -> None:
    sums = HeadSums(("a",))
    sums.start("x", 2, CPU)
    assert sums.empty
    assert sums.summarize()["x"]["a"].isnan().all()
    sums.add("y", {"a": (torch.zeros(2), torch.ones(2))})
    assert not sums.empty
    sums.start("y", 2, CPU)  # keeps what is there
    assert sums.summarize()["y"]["a"].tolist() == [0.0, 0.0]
    sums.clear()
    assert sums.empty
    assert sums.summarize() == {}


def test_many_small_values_are_not_lost_in_a_large_sum() -> None:
    sums = HeadSums(("a",))
    sums.add("x", {"a": (torch.tensor([2.0**25]), torch.tensor(1.0))})
    for _ in range(1024):
        sums.add("x", {"a": (torch.ones(1), torch.tensor(0.0))})
    assert sums.summarize()["x"]["a"].item() == 2.0**25 + 1024  # float32 would add nothing
