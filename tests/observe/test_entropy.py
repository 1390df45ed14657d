"""Properties of the entropy of a row."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.observe.rows import compute_row_entropy

INF = float("inf")
quick = settings(deadline=None, max_examples=60)


@st.composite
def masked_logits(draw: st.DrawFn) -> torch.Tensor:
    """[B, H, R, S] of moderate to extreme logits, any of them masked."""
    shape = tuple(draw(st.integers(1, top)) for top in (2, 3, 4, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    spread = draw(st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]))
    logits = torch.randn(shape, generator=generator) * spread
    share = draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    masked = torch.rand(shape, generator=generator) < share
    return logits.masked_fill(masked, -INF)


@quick
@given(masked_logits())
def test_bounds(logits: torch.Tensor) -> None:
    entropy, normalized, visible = compute_row_entropy(logits)
    assert torch.equal(visible, (logits > -INF).sum(-1))
    assert (entropy >= 0).all()
    assert (entropy <= visible.clamp_min(1).log() + 1e-5).all()
    assert ((normalized >= 0) & (normalized <= 1 + 1e-5)).all()


@quick
@given(masked_logits())
def test_it_is_the_sum_of_p_log_p(logits: torch.Tensor) -> None:
    entropy, normalized, visible = compute_row_entropy(logits)
    explicit = torch.special.entr(logits.double().softmax(-1)).sum(-1)
    explicit = torch.where(visible > 0, explicit, torch.zeros_like(explicit))
    torch.testing.assert_close(entropy.double(), explicit, atol=1e-5, rtol=1e-5)
    several = visible > 1
    torch.testing.assert_close(
        normalized[several].double(), (explicit / visible.log())[several], atol=1e-5, rtol=1e-5
    )


@quick
@given(masked_logits(), st.floats(-1e3, 1e3))
def test_a_constant_added_to_a_row_changes_nothing(logits: torch.Tensor, shift: float) -> None:
    exact = logits.double()
    torch.testing.assert_close(compute_row_entropy(exact + shift)[0], compute_row_entropy(exact)[0])


@quick
@given(masked_logits(), st.integers(1, 5))
def test_masked_keys_change_nothing(logits: torch.Tensor, more: int) -> None:
    hidden = torch.full((*logits.shape[:-1], more), -INF)
    for got, expected in zip(
        compute_row_entropy(torch.cat([logits, hidden], -1)),
        compute_row_entropy(logits),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


@quick
@given(st.integers(1, 500), st.integers(0, 5), st.floats(-50, 50))
def test_uniform_rows_have_the_highest_entropy(n: int, hidden: int, value: float) -> None:
    logits = torch.full((1, 1, 1, n + hidden), -INF)
    logits[..., hidden:] = value
    entropy, normalized, visible = compute_row_entropy(logits)
    assert math.isclose(entropy.item(), math.log(n), abs_tol=1e-5)
    assert math.isclose(normalized.item(), 1.0 if n > 1 else 0.0, abs_tol=1e-5)
    assert visible.item() == n


@quick
@given(st.integers(1, 50), st.data())
def test_rows_that_attend_to_one_key_have_none(n: int, data: st.DataObject) -> None:
    logits = torch.full((1, 1, 1, n), -1e4)
    logits[..., data.draw(st.integers(0, n - 1))] = 0.0
    entropy, normalized, _ = compute_row_entropy(logits)
    assert entropy.item() == normalized.item() == 0.0


def test_rows_that_see_nothing() -> None:
    entropy, normalized, visible = compute_row_entropy(torch.full((1, 2, 3, 4), -INF))
    assert not entropy.any()
    assert not normalized.any()
    assert not visible.any()


def test_what_is_not_a_number_is_not_called_zero() -> None:
    logits = torch.zeros(1, 1, 3, 4)
    logits[0, 0, 1, 2] = float("nan")
    logits[0, 0, 2] = float("nan")
    for values in compute_row_entropy(logits)[:2]:
        assert values[0, 0].isnan().tolist() == [False, True, True]
