"""What `datasets` keeps on disk: one copy of the same work, never a stale one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from surgery.data.cache import hash_tokenizer
from surgery.models.source import make_byte_tokenizer
from tests.data.making import all_rows, documents, ids_of, text_data, word_tokenizer, write_texts


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture
def path(tmp_path: Path) -> str:
    return write_texts(tmp_path / "texts.jsonl", documents(50))


def _files(folder: Path) -> set[str]:
    return {str(found) for found in folder.rglob("*.arrow")}


def _rows(path: str, **fields: Any) -> list[dict[str, Any]]:
    # A tokenizer of its own, as another run would have.
    tokenizer = word_tokenizer(eos_token="</s>", pad_token="<pad>")
    return all_rows(text_data(path, tokenizer, **{"val_path": path, **fields}))


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_the_same_run_adds_nothing(cache: Path, path: str, layout: str) -> None:
    first = _rows(path, layout=layout)
    kept = _files(cache)
    assert kept
    assert _rows(path, layout=layout) == first
    assert _files(cache) == kept


def test_another_tokenizer_or_window_is_not_read_from_the_cache(cache: Path, path: str) -> None:
    first = _rows(path)
    assert len(_rows(path, seq_len=6)[0]["input_ids"]) == 6
    assert set(_rows(path, isolate_documents=False)[0]) == {"input_ids"}
    begun = word_tokenizer(eos_token="</s>", pad_token="<pad>", begins=True)
    assert all_rows(text_data(path, begun, val_path=path)) != first
    assert _rows(path) == first


@pytest.mark.parametrize("keep_times", [False, True])
def test_a_changed_file_is_read_again(path: str, keep_times: bool) -> None:
    before = os.stat(path)
    first = _rows(path, layout="padded")
    # The same size, and, as an unpacked archive might have, the same time of change.
    write_texts(Path(path), [text.replace("w1", "w2") for text in documents(50)])
    if keep_times:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    again = _rows(path, layout="padded")
    assert again != first
    assert again[0]["input_ids"][0] in ids_of(documents(50)[0].replace("w1", "w2"))


def test_streams_keep_nothing(cache: Path, path: str) -> None:
    _rows(path, streaming="always", val_path=None, val_fraction=0.3)
    assert not _files(cache)


def test_identity_survives_use_and_tells_tokenizers_apart() -> None:
    tokenizer = word_tokenizer(eos_token="</s>", pad_token="<pad>")
    identity = hash_tokenizer(tokenizer)
    tokenizer(["w1 w2 w3", "w4"], truncation=True, max_length=2, padding=True)
    assert hash_tokenizer(tokenizer) == identity
    others = [
        word_tokenizer(eos_token="</s>"),
        word_tokenizer(eos_token="<s>", pad_token="<pad>"),
        word_tokenizer(eos_token="</s>", pad_token="<pad>", begins=True),
        make_byte_tokenizer(),
    ]
    assert len({identity, *map(hash_tokenizer, others)}) == 5
