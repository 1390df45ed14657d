"""What cannot be read is refused, naming the key, what was given, and what would do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from surgery.config.schema import Task
from surgery.data.module import TextData
from surgery.data.sources import check_source
from surgery.errors import ConfigError
from tests.data.making import (
    data_config,
    documents,
    text_data,
    word_tokenizer,
    write_rows,
    write_texts,
)

TEXTS = documents(100)
# File name to content, written before each test.
FILES: dict[str, bytes] = {
    "good.jsonl": b"".join(b'{"text": "%s"}\n' % text.encode() for text in TEXTS),
    "good.txt": "\n\n".join(TEXTS).encode(),
    "short.txt": b"w1 w2",
    "empty.txt": b"",
    "blank.txt": b"\n\n  \n\n\t\n",
    "blank.jsonl": b"\n\n\n",
    "blanks.jsonl": b'{"text": ""}\n{"text": " "}\n{"text": null}\n',
    "broken.jsonl": b'{"text": "w1"}\n{"text": \n{"text": "w2"}\n',
    "numbers.jsonl": b'{"text": 1}\n{"text": 2}\n',
    "latin.txt": b"caf\xe9 \xff\n",
    "broken.parquet": b"PAR1 but not really",
    "corpus.csv": b"text\nw1\n",
}
STREAMING = ["never", "always"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _refused(path: Any, **fields: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        text_data(path, **fields).setup()
    return caught.value


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        (None, "must be a file"),
        ([], "must be a file"),
        ("nowhere.jsonl", "no such file"),
        (".", "is a folder"),
        ("empty.txt", "empty"),
        ("corpus.csv", "unknown file type"),
        (["good.jsonl", "nowhere.jsonl"], "no such file"),
        (["good.jsonl", "good.txt"], "of the same type"),
    ],
)
def test_files_that_cannot_be(path: Any, problem: str) -> None:
    error = _refused(path)
    assert error.key == "data.path"
    assert problem in error.problem
    assert error.valid
    # Known without reading the data, so a run refuses it at once.
    with pytest.raises(ConfigError, match=error.problem):
        check_source(data_config(path=path))
    if path is not None and path != []:
        error = _refused("good.jsonl", val_path=path)
        assert error.key == "data.val_path"
        assert problem in error.problem


def test_the_file_types_are_listed() -> None:
    assert _refused("corpus.csv").valid == ".txt, .jsonl, .json, .parquet"


@pytest.mark.parametrize("streaming", STREAMING)
@pytest.mark.parametrize("path", ["blank.txt", "blank.jsonl", "blanks.jsonl"])
def test_nothing_but_blanks(path: str, streaming: str) -> None:
    error = _refused(path, streaming=streaming)
    assert error.key == "data.path"
    error = _refused("good.jsonl", val_path=path)
    assert error.key == "data.val_path"


@pytest.mark.parametrize("path", ["broken.jsonl", "broken.parquet", "latin.txt"])
@pytest.mark.parametrize("streaming", STREAMING)
def test_what_is_malformed(path: str, streaming: str) -> None:
    error = _refused(path, streaming=streaming)
    assert error.key == "data.path"
    assert error.problem.startswith("cannot be read: ")
    assert len(error.problem) > len("cannot be read: ")
    assert _refused("good.jsonl", val_path=path).key == "data.val_path"


@pytest.mark.parametrize("streaming", STREAMING)
def test_a_missing_column_lists_the_others(folder: Path, streaming: str) -> None:
    write_rows(folder / "c.jsonl", [{"id": n, "body": text} for n, text in enumerate(TEXTS)])
    error = _refused("c.jsonl", streaming=streaming)
    assert (error.key, error.given, error.valid) == ("data.text_column", "text", "id, body")
    data = TextData(
        data_config(path="c.jsonl", text_column="body", layout="padded", streaming=streaming),
        word_tokenizer(pad_token="<pad>"),
        Task.sequence_classification,
        seed=0,
    )
    with pytest.raises(ConfigError) as caught:
        data.setup()
    assert (caught.value.key, caught.value.given) == ("data.label_column", "label")
    assert caught.value.valid == "id, body"


@pytest.mark.parametrize("streaming", STREAMING)
def test_a_column_of_something_else_than_text(streaming: str) -> None:
    error = _refused("numbers.jsonl", streaming=streaming)
    assert (error.key, error.given) == ("data.text_column", "1")


@pytest.mark.parametrize("streaming", STREAMING)
def test_text_shorter_than_one_window(streaming: str) -> None:
    error = _refused("short.txt", val_path="good.jsonl", streaming=streaming)
    assert error.key == "data.path"
    assert "shorter than one window" in error.problem
    error = _refused("good.jsonl", val_path="short.txt", streaming=streaming)
    assert error.key == "data.val_path"
    assert "shorter than one window" in error.problem


@pytest.mark.parametrize("streaming", STREAMING)
def test_nothing_held_out(streaming: str) -> None:
    error = _refused("good.jsonl", val_fraction=0.0, streaming=streaming)
    assert (error.key, error.given) == ("data.val_fraction", 0.0)


@pytest.mark.parametrize("streaming", STREAMING)
def test_a_batch_larger_than_the_data(streaming: str) -> None:
    data = text_data("good.jsonl", batch_size=1000, streaming=streaming)
    data.setup()  # measuring has a batch size of its own
    for refuse in (data.check_training, data.train_dataloader):
        with pytest.raises(ConfigError) as caught:
            refuse()
        assert (caught.value.key, caught.value.given) == ("data.batch_size", 1000)
        most = int(str(caught.value.valid).removeprefix("1 to "))
    text_data("good.jsonl", batch_size=most, streaming=streaming).check_training()


def test_how_a_text_file_is_split() -> None:
    error = _refused("good.txt", sample_by="sentence")
    assert error.key == "data.sample_by"
    assert error.valid == "paragraph, line, document"


@pytest.mark.parametrize(
    ("kind", "fields", "key"),
    [
        ("stdlib", {"path": "good.jsonl"}, "data.path"),
        ("stdlib", {"val_path": "good.jsonl"}, "data.val_path"),
        ("hub", {"path": "owner/name", "val_path": "good.jsonl"}, "data.val_path"),
    ],
)
def test_files_that_would_not_be_read(kind: str, fields: dict[str, Any], key: str) -> None:
    """`data.path=x` without `data=text` would train on the standard library instead."""
    with pytest.raises(ConfigError, match="is not used by") as caught:
        check_source(data_config(kind, **fields))
    assert caught.value.key == key
    assert "data=text" in str(caught.value.valid)


@pytest.mark.parametrize("kind", ["hub", "text"])
def test_parts_are_the_librarys(kind: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match="is not used by") as caught:
        check_source(data_config(kind, path=str(folder / "good.jsonl"), part="code"))
    assert caught.value.key == "data.part"
    assert caught.value.valid == "data=stdlib data.part=code"


@pytest.mark.parametrize("streaming", STREAMING)
@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"path": None}, "data.path"),
        ({"path": "nobody/nothing"}, "data.path"),
        ({"split": "nope"}, "data.split"),
        ({"val_split": "nope"}, "data.val_split"),
    ],
)
def test_hub_data_that_is_not_there(
    folder: Path, fields: dict[str, Any], key: str, streaming: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (folder / "set").mkdir()
    write_texts(folder / "set" / "train.jsonl", TEXTS)
    cfg = data_config("hub", **{"path": str(folder / "set"), "streaming": streaming, **fields})
    with pytest.raises(ConfigError) as caught:
        TextData(cfg, word_tokenizer(), Task.causal_lm, seed=0).setup()
    assert caught.value.key == key


def test_what_breaks_in_the_middle_of_a_stream(folder: Path) -> None:
    write_texts(folder / "long.jsonl", documents(3000))
    paths = ["long.jsonl", "broken.jsonl"]
    data = text_data(paths, val_path="good.jsonl", streaming="always")
    data.setup()
    with pytest.raises(ConfigError, match=r"data\.path: cannot be read") as caught:
        for _ in data.train_dataloader():
            pass
    assert caught.value.key == "data.path"
