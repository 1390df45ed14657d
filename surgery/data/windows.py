"""Documents to model inputs: packed windows that waste nothing, or one padded row each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from surgery.config.schema import DataConfig, Layout, Task
from surgery.data.sources import LABEL, TEXT, Documents

# Documents whose tokens are packed together; what is left over at the end is dropped.
PACK_DOCUMENTS = 1000


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[np.ndarray]:
    """Token ids of each text, without special tokens."""
    if type(tokenizer) is ByT5Tokenizer:
        # The same ids as the tokenizer's own loop over characters, hundreds of times faster;
        # and text that spells a special token stays text.
        offset = tokenizer.offset
        return [
            np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32) + offset
            for text in texts
        ]
    ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return [np.asarray(row, dtype=np.int32) for row in ids]


def to_windows(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    cfg: DataConfig,
    task: Task,
) -> Documents:
    """Rows of `input_ids`, with `position_ids` where packed documents are kept apart."""
    if task is Task.sequence_classification:
        make = _classified(tokenizer, cfg.seq_len)
    elif cfg.layout is Layout.packed:
        make = _packed(tokenizer, cfg.seq_len, cfg.isolate_documents)
    else:
        make = _pieces(tokenizer, cfg.seq_len, task)
    return documents.map(
        make, batched=True, batch_size=PACK_DOCUMENTS, remove_columns=documents.column_names
    )


def _packed(
    tokenizer: PreTrainedTokenizerBase, seq_len: int, isolate: bool
) -> Callable[[dict[str, list[Any]]], dict[str, Any]]:
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    tail = np.asarray([] if end is None else [end], dtype=np.int32)

    def make(batch: dict[str, list[Any]]) -> dict[str, Any]:
        documents = [np.concatenate([ids, tail]) for ids in encode(tokenizer, batch[TEXT])]
        tokens = np.concatenate(documents) if documents else tail
        count = len(tokens) // seq_len
        windows = {"input_ids": tokens[: count * seq_len].reshape(count, seq_len)}
        if isolate:
            starts = np.zeros(len(tokens), dtype=np.int64)
            borders = np.cumsum([0] + [len(ids) for ids in documents[:-1]])
            starts[borders[borders < len(tokens)]] = borders[borders < len(tokens)]
            windows["position_ids"] = _positions(len(tokens), starts, count, seq_len)
        return windows

    return make


def _positions(length: int, starts: np.ndarray, count: int, seq_len: int) -> np.ndarray:
    """Distance to the document's start, or to the window's where that is nearer."""
    index = np.arange(length)
    window_start = index // seq_len * seq_len
    document_start = np.maximum.accumulate(starts)
    positions = index - np.maximum(window_start, document_start)
    return positions[: count * seq_len].reshape(count, seq_len).astype(np.int32)


def _pieces(
    tokenizer: PreTrainedTokenizerBase, seq_len: int, task: Task
) -> Callable[[dict[str, list[Any]]], dict[str, Any]]:
    """One row per document; a longer one becomes several."""
    special = tokenizer.num_special_tokens_to_add() if task is Task.masked_lm else 0
    room = seq_len - special

    def make(batch: dict[str, list[Any]]) -> dict[str, Any]:
        rows = []
        for ids in encode(tokenizer, batch[TEXT]):
            for start in range(0, len(ids), room):
                piece = ids[start : start + room].tolist()
                rows.append(tokenizer.build_inputs_with_special_tokens(piece) if special else piece)
        # A row needs a token to predict from and one to predict.
        return {"input_ids": [row for row in rows if len(row) > 1]}

    return make


def _classified(
    tokenizer: PreTrainedTokenizerBase, seq_len: int
) -> Callable[[dict[str, list[Any]]], dict[str, Any]]:
    def make(batch: dict[str, list[Any]]) -> dict[str, Any]:
        rows = tokenizer(batch[TEXT], truncation=True, max_length=seq_len)
        return {"input_ids": rows["input_ids"], "labels": batch[LABEL]}

    return make
