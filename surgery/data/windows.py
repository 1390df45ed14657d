"""Documents to model inputs: packed windows that waste nothing, or one padded row each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import numpy as np
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from surgery.config.schema import DataConfig, Layout, Task
from surgery.data.cache import fingerprinted, tokenizer_identity
from surgery.data.sources import LABEL, TEXT, Documents, reading
from surgery.errors import ConfigError

# Documents whose tokens are packed together; what is left over at the end is dropped. More where
# documents are short, so that under 1 % is dropped; fewer where they are books.
PACK_DOCUMENTS = 1000
PACK_WINDOWS = 100
PACK_CHARACTERS = 32_000_000
# Characters handed to a tokenizer at a time: it needs some hundred bytes per token meanwhile.
ENCODE_CHARACTERS = 4_000_000
CHARACTERS_PER_TOKEN = 4

Rows = dict[str, Any]


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
    encoded: list[np.ndarray] = []
    for some in _portions(texts):
        made = tokenizer(some, add_special_tokens=False, return_attention_mask=False, verbose=False)
        encoded += [np.asarray(ids, dtype=np.int32) for ids in made["input_ids"]]
    return encoded


def _portions(texts: list[str]) -> Iterator[list[str]]:
    some: list[str] = []
    size = 0
    for text in texts:
        if some and size + len(text) > ENCODE_CHARACTERS:
            yield some
            some, size = [], 0
        some.append(text)
        size += len(text)
    if some:
        yield some


def frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens with which the tokenizer itself begins and ends a text."""
    made = tokenizer("a", return_special_tokens_mask=True)
    ids, special = list(made["input_ids"]), list(made["special_tokens_mask"])
    if 0 not in special:
        return [], []
    return ids[: special.index(0)], ids[len(ids) - special[::-1].index(0) :]


def to_windows(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    cfg: DataConfig,
    task: Task,
) -> Documents:
    """Rows of `input_ids`, with `position_ids` where packed documents are kept apart.

    Raises:
        ConfigError: windows too short for the tokenizer's special tokens, or labels that are not
            numbers.
    """
    size = PACK_DOCUMENTS
    columns = [TEXT]
    if task is Task.sequence_classification:
        make = _classified(tokenizer, cfg)
        columns.append(LABEL)
    elif cfg.layout is Layout.packed:
        make = _packed(tokenizer, cfg.seq_len, cfg.isolate_documents)
        size = _documents_per_pack(documents, cfg.seq_len)
    elif task is Task.masked_lm:
        make = _framed_pieces(tokenizer, cfg.seq_len)
    else:
        make = _pieces(tokenizer, cfg.seq_len)
    kept = isinstance(documents, datasets.Dataset)
    work = [
        tokenizer_identity(tokenizer) if kept else None,
        task.value,
        cfg.layout.value,
        cfg.seq_len,
        cfg.isolate_documents,
        size,
    ]
    return documents.map(
        make,
        batched=True,
        batch_size=size,
        remove_columns=columns,
        **fingerprinted(documents, "windows", *work),
    )


def _documents_per_pack(documents: Documents, seq_len: int) -> int:
    if isinstance(documents, datasets.Dataset):
        texts = documents[:PACK_DOCUMENTS][TEXT] if len(documents) else []
    else:
        with reading("data.path"):
            texts = [row[TEXT] for row in documents.take(PACK_DOCUMENTS)]
    mean = max(1.0, sum(map(len, texts)) / max(1, len(texts)))
    fewest = math.ceil(PACK_WINDOWS * seq_len * CHARACTERS_PER_TOKEN / mean)
    most = max(fewest, int(PACK_CHARACTERS / mean))
    return min(max(PACK_DOCUMENTS, fewest), most)


def _documents(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str]], list[np.ndarray]]:
    """Texts to tokens for a causal model: begun as the tokenizer does, and always ended."""
    before, after = frame(tokenizer)
    if not after and tokenizer.eos_token_id is not None:
        after = [tokenizer.eos_token_id]
    head, tail = np.asarray(before, dtype=np.int32), np.asarray(after, dtype=np.int32)

    def make(texts: list[str]) -> list[np.ndarray]:
        return [np.concatenate([head, ids, tail]) for ids in encode(tokenizer, texts)]

    return make


def _packed(
    tokenizer: PreTrainedTokenizerBase, seq_len: int, isolate: bool
) -> Callable[[Rows], Rows]:
    tokenize = _documents(tokenizer)

    def make(batch: Rows) -> Rows:
        documents = tokenize(batch[TEXT])
        tokens = np.concatenate([np.zeros(0, dtype=np.int32), *documents])
        count = len(tokens) // seq_len
        windows = {"input_ids": tokens[: count * seq_len].reshape(count, seq_len)}
        if isolate:
            lengths = np.asarray([len(ids) for ids in documents], dtype=np.int64)
            starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
            windows["position_ids"] = _positions(starts, count, seq_len)
        return windows

    return make


def _positions(starts: np.ndarray, count: int, seq_len: int) -> np.ndarray:
    """Distance to the document's start, or to the window's where that is nearer."""
    index = np.arange(count * seq_len)
    window_starts = index // seq_len * seq_len
    positions = index - np.maximum(window_starts, starts[: len(index)])
    return positions.reshape(count, seq_len).astype(np.int32)


def _pieces(tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Callable[[Rows], Rows]:
    """One row per document; a longer one becomes several."""
    tokenize = _documents(tokenizer)

    def make(batch: Rows) -> Rows:
        rows = _cut(tokenize(batch[TEXT]), seq_len)
        # A row needs a token to predict from and one to predict.
        return {"input_ids": [row for row in rows if len(row) > 1]}

    return make


def _framed_pieces(tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Callable[[Rows], Rows]:
    """As `_pieces`, each row begun and ended as the tokenizer does."""
    before, after = frame(tokenizer)
    room = seq_len - len(before) - len(after)
    if room < 1:
        raise ConfigError(
            "data.seq_len",
            "leaves no room beside the tokenizer's special tokens",
            given=seq_len,
            valid=f"at least {seq_len - room + 1}",
        )

    def make(batch: Rows) -> Rows:
        rows = _cut(encode(tokenizer, batch[TEXT]), room)
        return {"input_ids": [before + row.tolist() + after for row in rows]}

    return make


def _cut(documents: list[np.ndarray], length: int) -> list[np.ndarray]:
    return [
        ids[start : start + length] for ids in documents for start in range(0, len(ids), length)
    ]


def _classified(tokenizer: PreTrainedTokenizerBase, cfg: DataConfig) -> Callable[[Rows], Rows]:
    def make(batch: Rows) -> Rows:
        for label in batch[LABEL]:
            if type(label) is not int or label < 0:
                raise ConfigError(
                    "data.label_column",
                    "holds something else than class numbers",
                    given=f"{cfg.label_column}={label!r}",
                    valid="whole numbers from 0",
                )
        rows = tokenizer(batch[TEXT], truncation=True, max_length=cfg.seq_len)
        return {"input_ids": rows["input_ids"], "labels": batch[LABEL]}

    return make
