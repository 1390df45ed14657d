"""Turn documents into model inputs: packed windows without padding, or one padded row each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import numpy as np
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from surgery.config.schema import DataConfig, Layout, Task
from surgery.data.cache import hash_tokenizer, make_fingerprint
from surgery.data.sources import LABEL, TEXT, Documents, reading
from surgery.errors import ConfigError

# Documents whose tokens are packed together; the rest that does not fill a window is dropped.
# Short documents: more of them, so that less than 1 % is dropped. Books: fewer of them.
PACK_DOCUMENTS = 1000
PACK_WINDOWS = 100
PACK_CHARACTERS = 32_000_000
# Characters per call of a tokenizer, which needs some hundred bytes per token while it works.
ENCODE_CHARACTERS = 4_000_000
CHARACTERS_PER_TOKEN = 4

Columns = dict[str, Any]


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[np.ndarray]:
    """Encode each text as token ids, without special tokens."""
    if type(tokenizer) is ByT5Tokenizer:
        # The same ids as from the tokenizer, but hundreds of times faster. And text that looks
        # like a special token stays text.
        offset = tokenizer.offset
        return [
            np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32) + offset
            for text in texts
        ]
    encoded: list[np.ndarray] = []
    for portion in _split_texts(texts):
        output = tokenizer(
            portion, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        encoded += [np.asarray(ids, dtype=np.int32) for ids in output["input_ids"]]
    return encoded


def _split_texts(texts: list[str]) -> Iterator[list[str]]:
    portion: list[str] = []
    size = 0
    for text in texts:
        if portion and size + len(text) > ENCODE_CHARACTERS:
            yield portion
            portion, size = [], 0
        portion.append(text)
        size += len(text)
    if portion:
        yield portion


def find_special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Find the special tokens that the tokenizer puts before a text and after it."""
    output = tokenizer("a", return_special_tokens_mask=True)
    ids, special = list(output["input_ids"]), list(output["special_tokens_mask"])
    if 0 not in special:
        return [], []
    return ids[: special.index(0)], ids[len(ids) - special[::-1].index(0) :]


def make_windows(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    cfg: DataConfig,
    task: Task,
) -> Documents:
    """Make rows of `input_ids`, with `position_ids` if packed documents are isolated.

    Raises:
        ConfigError: windows are too short for the tokenizer's special tokens, or labels are not
            whole numbers.
    """
    size = PACK_DOCUMENTS
    columns = [TEXT]
    if task is Task.sequence_classification:
        make = _build_labelling(tokenizer, cfg)
        columns.append(LABEL)
    elif cfg.layout is Layout.packed:
        make = _build_packing(tokenizer, cfg.seq_len, cfg.isolate_documents)
        size = _count_documents_per_pack(documents, cfg.seq_len)
    elif task is Task.masked_lm:
        make = _build_framed_cutting(tokenizer, cfg.seq_len)
    else:
        make = _build_cutting(tokenizer, cfg.seq_len)
    kept = isinstance(documents, datasets.Dataset)
    work = [
        hash_tokenizer(tokenizer) if kept else None,
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
        **make_fingerprint(documents, "windows", *work),
    )


def _count_documents_per_pack(documents: Documents, seq_len: int) -> int:
    if isinstance(documents, datasets.Dataset):
        texts = documents[:PACK_DOCUMENTS][TEXT] if len(documents) else []
    else:
        with reading("data.path"):
            texts = [row[TEXT] for row in documents.take(PACK_DOCUMENTS)]
    mean = max(1.0, sum(map(len, texts)) / max(1, len(texts)))
    fewest = math.ceil(PACK_WINDOWS * seq_len * CHARACTERS_PER_TOKEN / mean)
    most = max(fewest, int(PACK_CHARACTERS / mean))
    return min(max(PACK_DOCUMENTS, fewest), most)


def _build_tokenize(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str]], list[np.ndarray]]:
    """Build the tokenizing for a causal model: begin as the tokenizer does, and always end."""
    before, after = find_special_tokens(tokenizer)
    if not after and tokenizer.eos_token_id is not None:
        after = [tokenizer.eos_token_id]
    head, tail = np.asarray(before, dtype=np.int32), np.asarray(after, dtype=np.int32)

    def make(texts: list[str]) -> list[np.ndarray]:
        return [np.concatenate([head, ids, tail]) for ids in encode(tokenizer, texts)]

    return make


def _build_packing(
    tokenizer: PreTrainedTokenizerBase, seq_len: int, isolate: bool
) -> Callable[[Columns], Columns]:
    tokenize = _build_tokenize(tokenizer)

    def make(batch: Columns) -> Columns:
        documents = tokenize(batch[TEXT])
        tokens = np.concatenate([np.zeros(0, dtype=np.int32), *documents])
        count = len(tokens) // seq_len
        windows = {"input_ids": tokens[: count * seq_len].reshape(count, seq_len)}
        if isolate:
            lengths = np.asarray([len(ids) for ids in documents], dtype=np.int64)
            starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
            windows["position_ids"] = _count_positions(starts, count, seq_len)
        return windows

    return make


def _count_positions(starts: np.ndarray, count: int, seq_len: int) -> np.ndarray:
    """Count tokens from the start of the document, or of the window if that is nearer."""
    index = np.arange(count * seq_len)
    window_starts = index // seq_len * seq_len
    positions = index - np.maximum(window_starts, starts[: len(index)])
    return positions.reshape(count, seq_len).astype(np.int32)


def _build_cutting(
    tokenizer: PreTrainedTokenizerBase, seq_len: int
) -> Callable[[Columns], Columns]:
    """Build a function that makes one row per document, or several of a long one."""
    tokenize = _build_tokenize(tokenizer)

    def make(batch: Columns) -> Columns:
        rows = _cut(tokenize(batch[TEXT]), seq_len)
        # A row needs a token to predict from and one to predict.
        return {"input_ids": [row for row in rows if len(row) > 1]}

    return make


def _build_framed_cutting(
    tokenizer: PreTrainedTokenizerBase, seq_len: int
) -> Callable[[Columns], Columns]:
    """As `_build_cutting`, but each row begins and ends as the tokenizer does it."""
    before, after = find_special_tokens(tokenizer)
    room = seq_len - len(before) - len(after)
    if room < 1:
        raise ConfigError(
            "data.seq_len",
            "leaves no room for text: the tokenizer's special tokens fill it",
            given=seq_len,
            valid=f"at least {seq_len - room + 1}",
        )

    def make(batch: Columns) -> Columns:
        rows = _cut(encode(tokenizer, batch[TEXT]), room)
        return {"input_ids": [before + row.tolist() + after for row in rows]}

    return make


def _cut(documents: list[np.ndarray], length: int) -> list[np.ndarray]:
    return [
        ids[start : start + length] for ids in documents for start in range(0, len(ids), length)
    ]


def _build_labelling(
    tokenizer: PreTrainedTokenizerBase, cfg: DataConfig
) -> Callable[[Columns], Columns]:
    def make(batch: Columns) -> Columns:
        for label in batch[LABEL]:
            if type(label) is not int or label < 0:
                raise ConfigError(
                    "data.label_column",
                    "has a value that is not a class number",
                    given=f"{cfg.label_column}={label!r}",
                    valid="whole numbers from 0",
                )
        rows = tokenizer(batch[TEXT], truncation=True, max_length=cfg.seq_len)
        return {"input_ids": rows["input_ids"], "labels": batch[LABEL]}

    return make
