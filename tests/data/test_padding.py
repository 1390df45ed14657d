"""Padded rows: one document or piece each, masks and labels that agree."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.config.schema import Task
from surgery.data.collate import IGNORED, CausalCollator, make_collator
from surgery.data.windows import make_windows
from tests.data.making import (
    BOS,
    EOS,
    PAD,
    WORDS,
    data_config,
    documents,
    ids_of,
    word_tokenizer,
)


def _padded(texts: list[str], tokenizer: Any, **fields: Any) -> list[dict[str, Any]]:
    rows = datasets.Dataset.from_dict({"text": texts})
    cfg = data_config(path="", layout="padded", **fields)
    return list(make_windows(rows, tokenizer, cfg, Task.causal_lm))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(WORDS), min_size=1), st.integers(2, 12))
def test_a_document_is_cut_and_ended(words: list[str], seq_len: int) -> None:
    rows = _padded([" ".join(words)], word_tokenizer(eos_token="</s>"), seq_len=seq_len)
    tokens = [*ids_of(" ".join(words)), EOS]
    joined = [token for row in rows for token in row["input_ids"]]
    # A last piece of one token has nothing to predict it from.
    assert joined == (tokens[:-1] if len(tokens) % seq_len == 1 else tokens)
    assert all(len(row["input_ids"]) == seq_len for row in rows[:-1])


def test_documents_begin_as_the_tokenizer_says() -> None:
    rows = _padded(["w1 w2"], word_tokenizer(begins=True, eos_token="</s>"))
    assert rows == [{"input_ids": [BOS, 6, 7, EOS]}]


@pytest.mark.parametrize("pad", ["<pad>", "</s>"])
def test_batch_is_masked_where_it_is_padded(pad: str) -> None:
    tokenizer = word_tokenizer(eos_token="</s>", pad_token=pad)
    rows = _padded(documents(5), tokenizer, seq_len=10)
    batch = make_collator(tokenizer, data_config(path=""), Task.causal_lm)(rows)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        rest = batch["input_ids"].shape[1] - length
        assert batch["input_ids"][index].tolist() == (
            row["input_ids"] + [tokenizer.pad_token_id] * rest
        )
        assert batch["attention_mask"][index].tolist() == [1] * length + [0] * rest
        # The end token is learnt, even where it is what rows are padded with.
        assert row["input_ids"][-1] == EOS
        assert batch["labels"][index].tolist() == row["input_ids"] + [IGNORED] * rest


@pytest.mark.parametrize(
    ("tokens", "filler"),
    [
        ({"pad_token": "<pad>", "eos_token": "</s>"}, PAD),
        ({"eos_token": "</s>"}, EOS),
        ({}, 0),
    ],
)
def test_what_pads_where_there_is_no_pad_token(tokens: dict[str, str], filler: int) -> None:
    collate = make_collator(word_tokenizer(**tokens), data_config(path=""), Task.causal_lm)
    batch = collate([{"input_ids": [7, 8, 9]}, {"input_ids": [7]}])
    assert batch["input_ids"].tolist() == [[7, 8, 9], [7, filler, filler]]


def test_rows_of_one_length_need_no_mask() -> None:
    batch = CausalCollator(0)([{"input_ids": [7, 8]}, {"input_ids": [9, 10]}])
    assert set(batch) == {"input_ids", "labels"}
    assert torch.equal(batch["labels"], batch["input_ids"])
