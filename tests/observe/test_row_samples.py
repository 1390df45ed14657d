"""Rows drawn at random: a subset of all rows, and fair to each."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.observe import AttentionCall
from surgery.observe.rows import compute_row_logits, sample_rows, weigh_rows
from tests.observe.explicit import entropies, recorded_calls
from tests.tiny_models import tiny_model, tokens

quick = settings(deadline=None, max_examples=60)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@quick
@given(st.integers(1, 200), st.one_of(st.none(), st.integers(1, 300)), st.integers(0, 2**31))
def test_rows_are_distinct_sorted_and_as_many_as_asked(
    count: int, rows: int | None, seed: int
) -> None:
    drawn = sample_rows(count, rows, generator(seed)).tolist()
    assert drawn == sorted(set(drawn))
    assert set(drawn) <= set(range(count))
    assert len(drawn) == (count if rows is None else min(rows, count))
    assert drawn == sample_rows(count, rows, generator(seed)).tolist()


def test_drawn_rows_are_those_of_the_full_map() -> None:
    ids = tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    call = recorded_calls(tiny_model("llama"), input_ids=ids, attention_mask=mask)[0]
    rows = sample_rows(20, 6, generator())
    everything = compute_row_logits(call, torch.arange(20))
    torch.testing.assert_close(compute_row_logits(call, rows), everything[:, :, rows])


def test_the_mean_over_drawn_rows_is_unbiased() -> None:
    """Exactly: each row is drawn equally often over all seeds, so the means average out."""
    call = recorded_calls(tiny_model("llama"), input_ids=tokens(1, 16))[0]
    every = entropies(call)[0]  # [H, N]
    draws = 4000
    drawn = torch.stack([sample_rows(16, 4, generator(seed)) for seed in range(draws)])
    means = every[:, drawn].mean(-1)  # [H, draws]
    standard_error = means.std(1) / draws**0.5
    assert ((means.mean(1) - every.mean(1)).abs() < 4 * standard_error).all()
    # Not vacuous: rows do differ.
    assert (every.std(1) > 0.1).all()


def test_weights_leave_padding_out() -> None:
    ids = tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    call = recorded_calls(tiny_model("llama"), input_ids=ids, attention_mask=mask)[0]
    rows = torch.tensor([0, 3, 5])
    assert weigh_rows(call, rows).tolist() == [[1.0, 1.0, 1.0]] * 2  # nobody said otherwise
    for kind in (torch.long, torch.bool, torch.float32):
        padded = _with_query_mask(call, mask.to(kind))
        assert weigh_rows(padded, rows).tolist() == [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]


def test_weights_of_numbered_documents_are_one() -> None:
    """Some collators number the documents of a row in its mask: 1, 2, 3, and 0 for padding."""
    call = recorded_calls(tiny_model("llama"), input_ids=tokens(1, 5))[0]
    numbered = _with_query_mask(call, torch.tensor([[1, 1, 2, 3, 0]]))
    assert weigh_rows(numbered, torch.arange(5)).tolist() == [[1.0, 1.0, 1.0, 1.0, 0.0]]


def test_weights_with_a_cache_are_the_last_ones() -> None:
    call = recorded_calls(tiny_model("llama"), input_ids=tokens(1, 2))[0]
    whole_text = _with_query_mask(call, torch.tensor([[0, 0, 1, 1, 0]]))
    assert weigh_rows(whole_text, torch.arange(2)).tolist() == [[1.0, 0.0]]


def _with_query_mask(call: AttentionCall, mask: torch.Tensor) -> AttentionCall:
    return replace(call, query_mask=mask)
