"""The standard library as a corpus: its files' bytes, split by path."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
import pytest

from surgery.config.schema import Task
from surgery.data.module import TextData
from surgery.data.sources import is_held_out, load_corpus
from surgery.data.stdlib import read_stdlib
from surgery.models.source import make_byte_tokenizer
from tests.data.making import data_config, word_tokenizer

ROOT = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture(scope="module")
def data() -> TextData:
    made = TextData(
        data_config("stdlib", seq_len=512), make_byte_tokenizer(), Task.causal_lm, seed=0
    )
    made.setup("fit")
    return made


def _text_of(rows: np.ndarray) -> bytes:
    """Windows back to bytes; the end tokens (1) become newlines of their own."""
    flat = rows.reshape(-1)
    return bytes(np.where(flat == 1, 0, np.maximum(flat, 3) - 3).astype(np.uint8).tolist())


def test_documents_are_the_files() -> None:
    documents = read_stdlib()
    assert {"os.py", "json/decoder.py"} <= documents.keys()
    assert list(documents) == [path.as_posix() for path in sorted(map(Path, documents))]
    for path in list(documents)[::100]:
        assert documents[path].encode() == (ROOT / path).read_bytes()


def test_windows_are_the_training_files_end_to_end(data: TextData) -> None:
    train = [text for path, text in read_stdlib().items() if not is_held_out(path, 0.05)]
    expected = b"".join(text.encode() + b"\0" for text in train)
    assert data._train is not None
    rows = np.asarray(data._train.with_format("numpy")["input_ids"][:])
    assert rows.shape[1] == 512
    read = _text_of(rows)
    assert read == expected[: len(read)]
    assert len(expected) - len(read) < 512


def test_held_out_files_are_no_training_files(data: TextData) -> None:
    held_out = [text for path, text in read_stdlib().items() if is_held_out(path, 0.05)]
    expected = b"".join(text.encode() + b"\0" for text in held_out)
    assert data._held_out is not None
    rows = np.asarray(data._held_out.with_format("numpy")["input_ids"][:])
    windows = {_text_of(row) for row in rows}
    assert windows == {
        expected[start : start + 512] for start in range(0, len(expected) - 511, 512)
    }


def test_what_is_left_out(tmp_path: Path) -> None:
    files = {
        "kept.py": b"kept = 1\n",
        "package/kept.py": "é = 1\n".encode(),
        "test/left.py": b"left = 1\n",
        "package/tests/left.py": b"left = 1\n",
        "site-packages/left.py": b"left = 1\n",
        "latin.py": b"\xe9 = 1\n",
        "blank.py": b"\n \n",
        "empty.py": b"",
        "other.txt": b"left\n",
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert list(read_stdlib(tmp_path)) == ["kept.py", "package/kept.py"]


def test_parts_are_held_out_by_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(40):
        text = f'"""Text {number}."""\nx = {number}\n'
        (tmp_path / f"m{number}.py").write_text(text)
    monkeypatch.setattr("surgery.data.stdlib.find_stdlib_root", lambda: tmp_path)
    halves = {}
    for part in ("code", "prose"):
        corpus = load_corpus(
            data_config("stdlib", part=part, val_fraction=0.3), Task.causal_lm, word_tokenizer()
        )
        halves[part] = [
            {"".join(filter(str.isdigit, row["text"])) for row in half}
            for half in (corpus.train, corpus.held_out)
        ]
    assert halves["code"] == halves["prose"]
    assert halves["code"][1] == {
        str(number) for number in range(40) if is_held_out(f"m{number}.py", 0.3)
    }
