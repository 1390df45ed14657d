"""Documents, from wherever `data.kind` says, split into training and held-out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from surgery.config.schema import DataConfig, DataKind, Streaming, Task
from surgery.data.split import is_held_out
from surgery.data.stdlib import stdlib_documents
from surgery.errors import ConfigError

Documents = datasets.Dataset | datasets.IterableDataset

TEXT = "text"
LABEL = "label"
_READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Corpus:
    """Documents as rows of `text` (and `label` for classification)."""

    train: Documents
    held_out: Documents

    @property
    def streamed(self) -> bool:
        return isinstance(self.train, datasets.IterableDataset)


def check_source(cfg: DataConfig) -> None:
    """Everything that can be refused without reading the data.

    Raises:
        ConfigError: a missing or empty file, or a file type that is not read.
    """
    if cfg.kind is DataKind.text:
        _files("data.path", cfg.path)
        if cfg.val_path is not None:
            _files("data.val_path", cfg.val_path)
    if cfg.kind is DataKind.hub and not isinstance(cfg.path, str):
        raise ConfigError("data.path", "a data set's name is required here", given=cfg.path)


def load_corpus(cfg: DataConfig, task: Task) -> Corpus:
    """The two halves of the data.

    Raises:
        ConfigError: data that is missing, empty, or lacks the named columns.
    """
    check_source(cfg)
    if cfg.kind is DataKind.stdlib:
        return _stdlib(cfg, task)
    if cfg.kind is DataKind.text:
        train, held_out = _text(cfg)
    else:
        train, held_out = _hub(cfg)
    columns = [cfg.text_column]
    if task is Task.sequence_classification:
        columns.append(cfg.label_column)
    train = _columns(train, cfg, columns)
    if held_out is None:
        fraction = cfg.val_fraction
        return Corpus(
            train=train.filter(lambda row: not is_held_out(row[TEXT], fraction)),
            held_out=train.filter(lambda row: is_held_out(row[TEXT], fraction)),
        )
    return Corpus(train=train, held_out=_columns(held_out, cfg, columns))


def _stdlib(cfg: DataConfig, task: Task) -> Corpus:
    if task is Task.sequence_classification:
        raise ConfigError(
            "data", "the standard library has no labels", given="stdlib", valid="text, hub"
        )
    documents = stdlib_documents()
    halves: dict[bool, list[str]] = {False: [], True: []}
    for path, text in documents.items():
        halves[is_held_out(path, cfg.val_fraction)].append(text)
    return Corpus(
        train=datasets.Dataset.from_dict({TEXT: halves[False]}),
        held_out=datasets.Dataset.from_dict({TEXT: halves[True]}),
    )


def _files(key: str, given: Any) -> list[Path]:
    names = [given] if isinstance(given, str) else list(given or [])
    if not names:
        raise ConfigError(key, "a file is required here", given=given,
                          valid=f"one path or a list of paths ({', '.join(_READERS)})")
    paths = [Path(str(name)).expanduser() for name in names]
    for path in paths:
        if not path.is_file():
            raise ConfigError(key, "there is no such file", given=str(path))
        if path.suffix not in _READERS:
            raise ConfigError(key, "this file type is not read", given=str(path), valid=_READERS)
        if path.stat().st_size == 0:
            raise ConfigError(key, "the file is empty", given=str(path))
    if len({_READERS[path.suffix] for path in paths}) > 1:
        raise ConfigError(key, "files of one list must be of one type", given=list(map(str, paths)))
    return paths


def _text(cfg: DataConfig) -> tuple[Documents, Documents | None]:
    paths = _files("data.path", cfg.path)
    held_out_paths = _files("data.val_path", cfg.val_path) if cfg.val_path is not None else []
    size_gb = sum(path.stat().st_size for path in paths) / 1e9
    streamed = cfg.streaming is Streaming.always or (
        cfg.streaming is Streaming.auto and size_gb > cfg.stream_above_gb
    )

    def read(files: list[Path], stream: bool, key: str) -> Documents:
        reader = _READERS[files[0].suffix]
        options = {"sample_by": cfg.sample_by} if reader == "text" else {}
        names = [str(path) for path in files]
        return _read(
            key,
            lambda: datasets.load_dataset(
                reader, data_files=names, split="train", streaming=stream, **options
            ),
        )

    train = read(paths, streamed, "data.path")
    return train, read(held_out_paths, False, "data.val_path") if held_out_paths else None


def _hub(cfg: DataConfig) -> tuple[Documents, Documents | None]:
    def read(split: str | None, key: str) -> Documents:
        return _read(
            key,
            lambda: datasets.load_dataset(
                cfg.path,
                cfg.name,
                split=split,
                revision=cfg.revision,
                streaming=cfg.streaming is Streaming.always,
            ),
        )

    train = read(cfg.split, "data.path")
    return train, read(cfg.val_split, "data.val_split") if cfg.val_split else None


def _read(key: str, load: Callable[[], Any]) -> Documents:
    try:
        documents = load()
    except Exception as error:  # datasets wraps whatever its readers raise in its own classes
        cause = error.__cause__ or error
        raise ConfigError(key, f"cannot be read: {str(cause).splitlines()[0]}") from None
    if isinstance(documents, datasets.Dataset) and len(documents) == 0:
        raise ConfigError(key, "holds no document")
    return documents


def _columns(documents: Documents, cfg: DataConfig, wanted: list[str]) -> Documents:
    """Keep the wanted columns under our own names."""
    present = documents.column_names or list(next(iter(documents)))
    names = {cfg.text_column: TEXT, cfg.label_column: LABEL}
    for column in wanted:
        if column not in present:
            raise ConfigError(
                "data.text_column" if column == cfg.text_column else "data.label_column",
                "the data has no such column",
                given=column,
                valid=present,
            )
    documents = documents.select_columns(wanted)
    for column in wanted:
        if column != names[column]:
            documents = documents.rename_column(column, names[column])
    return documents
