"""Turn documents into model inputs: packed windows without padding, or one padded row each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import compress
from typing import Any, TypeAlias

import datasets
import numpy as np
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from surgery.config.schema import DataConfig, Layout, LossOn, Task
from surgery.data.cache import hash_tokenizer, make_fingerprint
from surgery.data.chat import ANSWERS, TEXT
from surgery.data.collate import LEARNT
from surgery.data.sources import LABEL, Documents, reading
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
# Rows of texts to token arrays, one per text, under the names of what rows will hold.
Tokenize: TypeAlias = Callable[[Columns], dict[str, list[np.ndarray]]]


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], *, parse_special: bool = False
) -> list[np.ndarray]:
    """Encode each text as token ids, without special tokens around it.

    Args:
        parse_special: whether text that looks like a special token has to be one. If not, that is
            left to the tokenizer.
    """
    if type(tokenizer) is ByT5Tokenizer and not parse_special:
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


def encode_answers(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    answers: list[list[tuple[int, int]]],
    *,
    parse_special: bool,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Encode as `encode`, and mark the tokens that hold a character of an answer.

    Args:
        answers: of each text: first characters, and the ones after the last.
        parse_special: whether text that looks like a special token is one.

    Returns:
        Token ids of each text, and a boolean per token.

    Raises:
        ConfigError: the tokenizer does not say where its tokens stand, and splits the beginning of
            a text in another way than the whole.
    """
    if not tokenizer.is_fast:
        return _encode_by_beginnings(tokenizer, texts, answers, parse_special)
    encoded: list[np.ndarray] = []
    marks: list[np.ndarray] = []
    spans = iter(answers)
    for portion in _split_texts(texts):
        output = tokenizer(
            portion,
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        for ids, offsets in zip(output["input_ids"], output["offset_mapping"], strict=True):
            encoded.append(np.asarray(ids, dtype=np.int32))
            marks.append(_mark_tokens(np.asarray(offsets).reshape(-1, 2), next(spans)))
    return encoded, marks


def _mark_tokens(offsets: np.ndarray, answers: list[tuple[int, int]]) -> np.ndarray:
    marks = np.zeros(len(offsets), dtype=bool)
    for start, end in answers:
        inside = np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > start))
        if len(inside):  # tokens between the first and the last may have no characters
            marks[inside[0] : inside[-1] + 1] = True
    return marks


def _encode_by_beginnings(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    answers: list[list[tuple[int, int]]],
    parse_special: bool,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    def count(text: str, whole: np.ndarray) -> int:
        (ids,) = encode(tokenizer, [text], parse_special=parse_special)
        if not np.array_equal(ids, whole[: len(ids)]):
            raise ConfigError(
                "data.loss_on",
                "this tokenizer does not say where its tokens stand, and splits the beginning of a "
                "text in another way than the whole",
                given="assistant",
                valid="all, or a tokenizer with a tokenizer.json",
            )
        return len(ids)

    encoded = encode(tokenizer, texts, parse_special=parse_special)
    marks = []
    for text, ids, spans in zip(texts, encoded, answers, strict=True):
        marks.append(np.zeros(len(ids), dtype=bool))
        for start, end in spans:
            marks[-1][count(text[:start], ids) : count(text[:end], ids)] = True
    return encoded, marks


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
    *,
    whole: bool = False,
) -> Documents:
    """Make rows of `input_ids`, with `position_ids` if packed documents are isolated.

    With `data.loss_on=assistant`, rows say which tokens are `learnt`; a row without one that can
    be predicted is left out.

    Args:
        whole: whether the texts have their special tokens already.

    Raises:
        ConfigError: windows are too short for the tokenizer's special tokens, or labels are not
            whole numbers.
    """
    size = PACK_DOCUMENTS
    columns = [TEXT]
    marked = cfg.loss_on is LossOn.assistant
    if marked:
        columns.append(ANSWERS)
    tokenize = _build_tokenize(tokenizer, whole=whole, marked=marked)
    if task is Task.sequence_classification:
        make = _build_labelling(tokenizer, cfg)
        columns.append(LABEL)
    elif cfg.layout is Layout.packed:
        make = _build_packing(tokenize, cfg.seq_len, cfg.isolate_documents)
        size = _count_documents_per_pack(documents, cfg.seq_len)
    elif task is Task.masked_lm:
        make = _build_framed_cutting(tokenizer, cfg.seq_len)
    else:
        make = _build_cutting(tokenize, cfg.seq_len)
    kept = isinstance(documents, datasets.Dataset)
    work = [
        hash_tokenizer(tokenizer) if kept else None,
        task.value,
        cfg.layout.value,
        cfg.seq_len,
        cfg.isolate_documents,
        size,
        whole,
        marked,
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


def _build_tokenize(tokenizer: PreTrainedTokenizerBase, *, whole: bool, marked: bool) -> Tokenize:
    """Build the tokenizing for a causal model: begin as the tokenizer does, and always end.

    Args:
        whole: nothing is to be added to the texts.
        marked: whether tokens of answers are marked. Then the end of a text that ends with an
            answer is one of them.
    """
    before, after = ([], []) if whole else find_special_tokens(tokenizer)
    if not whole and not after and tokenizer.eos_token_id is not None:
        after = [tokenizer.eos_token_id]
    head, tail = np.asarray(before, dtype=np.int32), np.asarray(after, dtype=np.int32)

    def tokenize(batch: Columns) -> dict[str, list[np.ndarray]]:
        if not marked:
            encoded = encode(tokenizer, batch[TEXT], parse_special=whole)
            return {"input_ids": [np.concatenate([head, ids, tail]) for ids in encoded]}
        encoded, marks = encode_answers(tokenizer, batch[TEXT], batch[ANSWERS], parse_special=whole)
        learnt = [
            np.concatenate(
                [np.zeros(len(head), bool), mark, np.full(len(tail), bool(len(mark)) and mark[-1])]
            )
            for mark in marks
        ]
        ids = [np.concatenate([head, ids, tail]) for ids in encoded]
        return {"input_ids": ids, LEARNT: learnt}

    return tokenize


def _build_packing(tokenize: Tokenize, seq_len: int, isolate: bool) -> Callable[[Columns], Columns]:
    def make(batch: Columns) -> Columns:
        documents = tokenize(batch)
        lengths = np.asarray([len(ids) for ids in documents["input_ids"]], dtype=np.int64)
        count = int(lengths.sum()) // seq_len
        windows = {
            name: np.concatenate(values)[: count * seq_len].reshape(count, seq_len)
            if values
            else np.zeros((0, seq_len), dtype=np.int32)
            for name, values in documents.items()
        }
        if isolate:
            starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
            windows["position_ids"] = _count_positions(starts, count, seq_len)
        if LEARNT in windows:
            predicted = windows[LEARNT][:, 1:]
            if isolate:
                predicted = predicted & (windows["position_ids"][:, 1:] != 0)
            kept = predicted.any(axis=1)
            windows = {name: values[kept] for name, values in windows.items()}
        return windows

    return make


def _count_positions(starts: np.ndarray, count: int, seq_len: int) -> np.ndarray:
    """Count tokens from the start of the document, or of the window if that is nearer."""
    index = np.arange(count * seq_len)
    window_starts = index // seq_len * seq_len
    positions = index - np.maximum(window_starts, starts[: len(index)])
    return positions.reshape(count, seq_len).astype(np.int32)


def _build_cutting(tokenize: Tokenize, seq_len: int) -> Callable[[Columns], Columns]:
    """Build a function that makes one row per document, or several of a long one."""

    def make(batch: Columns) -> Columns:
        pieces = {name: _cut(values, seq_len) for name, values in tokenize(batch).items()}
        # A row needs a token to predict from and one to predict.
        learnt = pieces.get(LEARNT, pieces["input_ids"])
        kept = [bool(len(row) > 1 and (LEARNT not in pieces or row[1:].any())) for row in learnt]
        return {name: list(compress(rows, kept)) for name, rows in pieces.items()}

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
