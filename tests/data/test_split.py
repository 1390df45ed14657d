"""The held-out share: a fixed hash, nothing else."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from surgery.data.sources import is_held_out

KEYS = st.lists(st.text(), unique=True)
FRACTIONS = st.floats(0, 1)


@given(KEYS, FRACTIONS, st.randoms())
def test_order_and_company_do_not_matter(
    keys: list[str], fraction: float, shuffler: random.Random
) -> None:
    held_out = {key for key in keys if is_held_out(key, fraction)}
    shuffled = keys[: len(keys) // 2]
    shuffler.shuffle(shuffled)
    assert {key for key in shuffled if is_held_out(key, fraction)} == held_out & set(shuffled)


@given(st.text(), FRACTIONS, FRACTIONS)
def test_a_larger_share_only_adds(key: str, one: float, other: float) -> None:
    small, large = sorted((one, other))
    assert is_held_out(key, large) or not is_held_out(key, small)


@given(st.text())
def test_none_and_all(key: str) -> None:
    assert not is_held_out(key, 0.0)
    assert is_held_out(key, 1.0)


def test_known_hash() -> None:
    # sha256("abc") begins ba7816bf 8f01cfea (FIPS 180-4): 0xba78… / 2^64 = 0.728.
    assert not is_held_out("abc", 0.728)
    assert is_held_out("abc", 0.729)


def test_the_share_is_about_the_fraction() -> None:
    share = sum(is_held_out(f"file_{number}.py", 0.05) for number in range(20_000)) / 20_000
    assert abs(share - 0.05) < 0.006  # four standard deviations
