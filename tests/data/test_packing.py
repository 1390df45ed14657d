"""Packed windows: every token in its place, documents ended, borders known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.config.schema import Task
from surgery.data.collate import IGNORED, CausalCollator
from surgery.data.windows import PACK_DOCUMENTS, make_windows
from tests.data.making import (
    BOS,
    EOS,
    WORDS,
    all_rows,
    data_config,
    documents,
    ids_of,
    text_data,
    word_tokenizer,
    write_texts,
)

TEXTS = st.lists(st.lists(st.sampled_from(WORDS), min_size=1).map(" ".join), min_size=1)


def _packed(texts: list[str], tokenizer: Any, **fields: Any) -> list[dict[str, Any]]:
    rows = datasets.Dataset.from_dict({"text": texts})
    return list(make_windows(rows, tokenizer, data_config(path="", **fields), Task.causal_lm))


@settings(max_examples=30, deadline=None)
@given(TEXTS, st.integers(2, 12))
def test_windows_joined_are_the_documents_joined(texts: list[str], seq_len: int) -> None:
    rows = _packed(texts, word_tokenizer(eos_token="</s>"), seq_len=seq_len)
    stream = [token for text in texts for token in [*ids_of(text), EOS]]
    whole = len(stream) // seq_len * seq_len
    assert [token for row in rows for token in row["input_ids"]] == stream[:whole]
    assert all(len(row["input_ids"]) == seq_len for row in rows)


@settings(max_examples=30, deadline=None)
@given(TEXTS, st.integers(2, 12))
def test_positions_start_again_at_documents_and_at_windows(texts: list[str], seq_len: int) -> None:
    rows = _packed(texts, word_tokenizer(eos_token="</s>"), seq_len=seq_len)
    positions = [place for text in texts for place in range(len(ids_of(text)) + 1)]
    for number, row in enumerate(rows):
        document = positions[number * seq_len : (number + 1) * seq_len]
        # Up to the first new document the window's own border is nearer than the document's.
        expected, last = [], -1
        for place in document:
            last = 0 if place == 0 else last + 1
            expected.append(last)
        assert row["position_ids"] == expected


def test_without_isolation_there_are_no_positions() -> None:
    rows = _packed(documents(9), word_tokenizer(eos_token="</s>"), isolate_documents=False)
    assert set(rows[0]) == {"input_ids"}
    assert set(CausalCollator(0)(rows)) == {"input_ids", "labels"}


@pytest.mark.parametrize(
    ("made", "before", "after"),
    [
        ({"eos_token": "</s>"}, [], [EOS]),
        ({"eos_token": "</s>", "begins": True}, [BOS], [EOS]),
        ({"eos_token": "</s>", "begins": True, "ends": True}, [BOS], [EOS]),
        ({"ends": True}, [], [EOS]),
        ({"sep_token": "</s>", "cls_token": "<s>", "begins": True, "ends": True}, [BOS], [EOS]),
        ({}, [], []),
    ],
)
def test_documents_begin_as_the_tokenizer_says_and_end_once(
    made: dict[str, Any], before: list[int], after: list[int]
) -> None:
    rows = _packed(["w1 w2", "w3", "w4 w5"], word_tokenizer(**made), seq_len=2)
    stream = [
        token for text in ("w1 w2", "w3", "w4 w5") for token in [*before, *ids_of(text), *after]
    ]
    read = [token for row in rows for token in row["input_ids"]]
    assert read == stream[: len(stream) // 2 * 2]


def test_labels_leave_out_what_another_document_would_predict() -> None:
    rows = _packed(["w1 w2", "w3 w4 w5"], word_tokenizer(eos_token="</s>"), seq_len=7)
    batch = CausalCollator(0)(rows)
    assert batch["input_ids"].tolist() == [[6, 7, EOS, 8, 9, 10, EOS]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert batch["labels"].tolist() == [[IGNORED, 7, EOS, IGNORED, 9, 10, EOS]]
    assert "attention_mask" not in batch


def test_the_end_token_is_learnt_even_where_it_pads() -> None:
    rows = _packed(["w1 w2"] * 4, word_tokenizer(eos_token="</s>", pad_token="</s>"), seq_len=3)
    assert (CausalCollator(EOS)(rows)["labels"][:, -1] == EOS).all()


def test_short_documents_are_not_wasted() -> None:
    """Lines far shorter than a window: only the very end of the text may be dropped."""
    texts = ["w1 w2 w3"] * (5 * PACK_DOCUMENTS)
    rows = _packed(texts, word_tokenizer(eos_token="</s>"), seq_len=3000)
    assert len(rows) == 4 * len(texts) // 3000


def test_the_window_may_be_longer_than_a_thousand_documents(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "lines.jsonl", documents(3000, longest=2))
    data = text_data(path, seq_len=4000, batch_size=1, val_path=path)
    assert len(all_rows(data)) == 1
