"""One or many files of any type, whole or streamed: the same documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from surgery.config.schema import DataConfig, Task
from surgery.data.sources import is_held_out, load_corpus
from tests.data.making import (
    EOS,
    all_rows,
    data_config,
    documents,
    ids_of,
    text_data,
    word_tokenizer,
    write_rows,
    write_texts,
)

TEXTS = documents(200)


def _halves(cfg: DataConfig) -> tuple[list[str], list[str]]:
    corpus = load_corpus(cfg, Task.causal_lm, word_tokenizer())
    train, held_out = ([row["text"] for row in half] for half in (corpus.train, corpus.held_out))
    return train, held_out


@pytest.fixture(params=["never", "always"])
def streaming(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".parquet"])
def test_every_file_type_gives_its_documents_split_by_hash(
    tmp_path: Path, suffix: str, streaming: str
) -> None:
    path = write_texts(tmp_path / f"corpus{suffix}", TEXTS)
    train, held_out = _halves(data_config(path=path, streaming=streaming, val_fraction=0.2))
    expected = [text + "\n" * (suffix == ".txt" and text is TEXTS[-1]) for text in TEXTS]
    assert train == [text for text in expected if not is_held_out(text, 0.2)]
    assert held_out == [text for text in expected if is_held_out(text, 0.2)]
    assert held_out


def test_many_files_are_read_in_the_order_given(tmp_path: Path, streaming: str) -> None:
    paths = [
        write_texts(tmp_path / f"{name}.jsonl", TEXTS[start : start + 50])
        for name, start in [("z", 0), ("a", 50), ("m", 100)]
    ]
    train, _ = _halves(data_config(path=paths, val_path=paths[0], streaming=streaming))
    assert train == TEXTS[:150]


def test_held_out_files(tmp_path: Path, streaming: str) -> None:
    path = write_texts(tmp_path / "train.jsonl", TEXTS[:120])
    val_path = write_texts(tmp_path / "val.txt", TEXTS[120:160])
    train, held_out = _halves(data_config(path=path, val_path=val_path, streaming=streaming))
    assert train == TEXTS[:120]
    assert [text.strip() for text in held_out] == TEXTS[120:160]


@pytest.mark.parametrize(
    ("sample_by", "expected"),
    [
        ("line", ["one", "two", "three", "four"]),
        ("paragraph", ["one\ntwo", "three\n\tfour\n"]),
        ("document", ["one\ntwo\n\n \n\nthree\n\tfour\n"]),
    ],
)
def test_what_a_document_of_a_text_file_is(
    tmp_path: Path, sample_by: str, expected: list[str], streaming: str
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\n \n\nthree\n\tfour\n")
    cfg = data_config(path=str(path), val_path=str(path), sample_by=sample_by, streaming=streaming)
    train, _ = _halves(cfg)
    assert [text.strip("\t") if sample_by == "line" else text for text in train] == expected


def test_blank_and_missing_documents_are_left_out(tmp_path: Path, streaming: str) -> None:
    rows: list[dict[str, Any]] = [{"text": text} for text in ("", "one", " \n", "two")]
    path = write_rows(tmp_path / "a.jsonl", [*rows, {"text": None}])
    train, held_out = _halves(data_config(path=path, val_path=path, streaming=streaming))
    assert train == held_out == ["one", "two"]


def test_columns_are_taken_by_name(tmp_path: Path, streaming: str) -> None:
    rows = [{"id": n, "text": "not this", "content": text} for n, text in enumerate(TEXTS)]
    path = write_rows(tmp_path / "a.parquet", rows)
    cfg = data_config(path=path, val_path=path, text_column="content", streaming=streaming)
    assert _halves(cfg)[0] == TEXTS


def test_names_are_no_patterns(tmp_path: Path) -> None:
    write_texts(tmp_path / "a1.jsonl", TEXTS[:10])
    path = write_texts(tmp_path / "a[1].jsonl", TEXTS[10:20])
    assert _halves(data_config(path=path, val_path=path))[0] == TEXTS[10:20]


@pytest.mark.parametrize(("above_gb", "streamed"), [(1e-9, True), (1.0, False)])
def test_auto_streams_what_is_large(tmp_path: Path, above_gb: float, streamed: bool) -> None:
    path = write_texts(tmp_path / "a.jsonl", TEXTS)
    cfg = data_config(path=path, stream_above_gb=above_gb, val_fraction=0.2)
    corpus = load_corpus(cfg, Task.causal_lm, word_tokenizer())
    assert isinstance(corpus.train, datasets.IterableDataset) is streamed


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_streamed_windows_are_the_same_windows(tmp_path: Path, layout: str) -> None:
    path = write_texts(tmp_path / "a.jsonl", TEXTS)
    fields: dict[str, Any] = {"layout": layout, "val_fraction": 0.2}
    whole = text_data(path, streaming="never", **fields)
    streamed = text_data(path, streaming="always", **fields)
    assert all_rows(whole) == all_rows(streamed)
    assert all_rows(whole, "held_out") == all_rows(streamed, "held_out")


def test_one_streamed_epoch_is_every_window_once(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "a.jsonl", TEXTS)
    data = text_data(path, streaming="always", batch_size=1, shuffle_buffer=50)
    rows = [row["input_ids"] for row in all_rows(data)]
    seen = [batch["input_ids"][0].tolist() for batch in data.train_dataloader()]
    assert seen != rows
    assert sorted(seen) == sorted(rows)


def test_a_directory_as_a_hub_data_set(tmp_path: Path, streaming: str) -> None:
    write_texts(tmp_path / "train.jsonl", TEXTS[:150])
    write_texts(tmp_path / "validation.jsonl", TEXTS[150:])
    path = str(tmp_path)
    cfg = data_config("hub", path=path, val_split="validation", streaming=streaming)
    assert _halves(cfg) == (TEXTS[:150], TEXTS[150:])
    train, held_out = _halves(data_config("hub", path=path, val_fraction=0.2))
    assert train == [text for text in TEXTS[:150] if not is_held_out(text, 0.2)]
    assert sorted(train + held_out) == sorted(TEXTS[:150])


def test_held_out_windows_come_shuffled_from_the_whole_half(tmp_path: Path) -> None:
    """So that the first few windows measured are not one document."""
    path = write_texts(tmp_path / "a.jsonl", TEXTS)
    data = text_data(path, val_path=path, isolate_documents=False)
    stream = [token for text in TEXTS for token in [*ids_of(text), EOS]]
    windows = [stream[at : at + 8] for at in range(0, len(stream) - 7, 8)]
    held_out = [row["input_ids"] for row in all_rows(data, "held_out")]
    assert held_out != windows
    assert sorted(held_out) == sorted(windows)
    assert data.held_out_size == len(windows)
