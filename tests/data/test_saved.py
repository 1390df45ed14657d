"""Folders that `save_to_disk` of datasets wrote are read as other files are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from surgery.data.sources import check_source
from surgery.errors import ConfigError
from tests.data.making import all_rows, data_config, documents, ids_of, text_data, write_texts

TEXTS = documents(60)
PADDED = {"layout": "padded", "seq_len": 20}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`one`: a Dataset in three files; `two`: train and validation; `three`: train and test."""
    one, few = (
        datasets.Dataset.from_dict({"text": TEXTS}),
        datasets.Dataset.from_dict({"text": TEXTS[:7]}),
    )
    one.save_to_disk(tmp_path / "one", num_shards=3)
    datasets.DatasetDict(train=one, validation=few).save_to_disk(tmp_path / "two")
    datasets.DatasetDict(train=one, test=few).save_to_disk(tmp_path / "three")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read_texts(data: Any, half: str = "train") -> list[list[int]]:
    return [row["input_ids"][:-1] for row in all_rows(data, half)]


@pytest.mark.parametrize("streaming", ["never", "always"])
def test_the_rows_of_a_data_set(streaming: str, folder: Path) -> None:
    """The same as from a file, split by the same hash; nothing is written beside them."""
    before = sorted(folder.rglob("*"))
    data = text_data("one", streaming=streaming, val_fraction=0.3, **PADDED)
    halves = [read_texts(data, half) for half in ("train", "held_out")]
    assert sorted(folder.rglob("*")) == before
    file = text_data(write_texts(folder / "t.jsonl", TEXTS), val_fraction=0.3, **PADDED)
    assert halves == [read_texts(file, half) for half in ("train", "held_out")]


def test_the_splits_of_several() -> None:
    wanted = sorted(map(ids_of, TEXTS[:7]))
    data = text_data("two", **PADDED)
    assert len(read_texts(data)) == 60
    assert sorted(read_texts(data, "held_out")) == wanted
    data = text_data("three", val_split="test", **PADDED)
    assert sorted(read_texts(data, "held_out")) == wanted
    data = text_data("one", val_path="two", **PADDED)
    assert sorted(read_texts(data, "held_out")) == wanted
    data = text_data("three", split="test", val_path="one", **PADDED)
    assert read_texts(data) == list(map(ids_of, TEXTS[:7]))
    assert len(read_texts(data, "held_out")) == 60
    data = text_data("three", val_fraction=0.3, **PADDED)  # nothing for validation: a share
    assert 0 < len(read_texts(data, "held_out")) < 60
    assert len(read_texts(text_data(["one", "one"], val_path="two", **PADDED))) == 120


@pytest.mark.parametrize(
    ("fields", "key", "words"),
    [
        ({"path": "empty"}, "data.path", ("is a folder", "save_to_disk", ".jsonl")),
        ({"path": "two", "split": "tran"}, "data.split", ("no such split", "train, validation")),
        ({"path": "two", "val_split": "test"}, "data.val_split", ("train, validation",)),
        ({"path": "one", "val_split": "test"}, "data.val_split", ("no splits", "val_path")),
        ({"path": "one", "val_path": "three"}, "data.val_split", ("train, test",)),
        ({"path": ["one", "text.txt"]}, "data.path", ("of the same type",)),
        ({"path": "broken"}, "data.path", ("state.json cannot be read",)),
        ({"path": "missing"}, "data.path", ("names a file that is not there",)),
        ({"path": "outside"}, "data.path", ("outside",)),
        ({"path": "half"}, "data.path", ("not saved whole",)),
    ],
)
def test_what_is_not_right_with_a_folder(
    fields: dict[str, Any], key: str, words: tuple[str, ...], folder: Path
) -> None:
    write_texts(folder / "text.txt", TEXTS)
    (folder / "empty").mkdir()
    for name, state in {
        "broken": "{",
        "missing": json.dumps({"_data_files": [{"filename": "data-0.arrow"}]}),
        "outside": json.dumps({"_data_files": [{"filename": "../one/state.json"}]}),
    }.items():
        (folder / name).mkdir()
        (folder / name / "state.json").write_text(state)
    (folder / "half" / "train").mkdir(parents=True)
    (folder / "half" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(ConfigError) as caught:
        check_source(data_config(**fields))
    assert caught.value.key == key
    for word in words:
        assert word in str(caught.value)
