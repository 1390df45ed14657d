"""Load documents from the source that `data.kind` names, and split off a held-out share."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import datasets
from datasets.utils.extract import Extractor
from transformers import PreTrainedTokenizerBase

from surgery.config.schema import DataConfig, DataKind, LossOn, Part, Streaming, Task
from surgery.data import saved
from surgery.data.cache import make_fingerprint
from surgery.data.chat import COMPLETION, TEXT, has_messages, render_rows
from surgery.data.stdlib import read_stdlib
from surgery.errors import ConfigError, SurgeryError
from surgery.files import find_unreadable

Documents: TypeAlias = datasets.Dataset | datasets.IterableDataset

LABEL = "label"
_READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_SAMPLES = ("paragraph", "line", "document")


@dataclass(frozen=True)
class Corpus:
    """Documents that are not blank, as rows of `text` (and `label` for classification).

    Attributes:
        whole: whether a text is whole: a chat template has put in every special token.
        shared: whether a share of one text is held out, by hash.
    """

    train: Documents
    held_out: Documents
    whole: bool = False
    shared: bool = False


def check_source(cfg: DataConfig) -> None:
    """Check everything that can be checked without reading the data.

    Raises:
        ConfigError: a file is missing, empty or of an unknown type, or a key is set that
            `data.kind` does not use.
    """
    without_files = cfg.kind in (DataKind.stdlib, DataKind.self)
    if cfg.kind not in (DataKind.text, DataKind.self) and cfg.val_path is not None:
        _refuse_unread("data.val_path", cfg.val_path, cfg.kind)
    if without_files and cfg.path is not None:
        _refuse_unread("data.path", cfg.path, cfg.kind)
    if cfg.kind is not DataKind.stdlib and cfg.part is not Part.all:
        _refuse_unread("data.part", cfg.part.value, cfg.kind, reader=DataKind.stdlib)
    if without_files and cfg.completion_column is not None:
        _refuse_unread("data.completion_column", cfg.completion_column, cfg.kind)
    if without_files and cfg.loss_on is not LossOn.all:
        _refuse_unread("data.loss_on", cfg.loss_on.value, cfg.kind)
    if cfg.kind is DataKind.self:
        if cfg.self is None:
            raise ConfigError("data.self", "is needed to sample the original", valid="data=self")
        if cfg.streaming is Streaming.always:
            _refuse_unread("data.streaming", cfg.streaming.value, cfg.kind)
        if cfg.val_path is not None:
            _resolve_held_out_files(cfg)
    if cfg.kind is DataKind.text:
        _resolve_halves(cfg)
    if cfg.kind in (DataKind.text, DataKind.self) and cfg.sample_by not in _SAMPLES:
        raise ConfigError(
            "data.sample_by", "unknown way to split a text", given=cfg.sample_by, valid=_SAMPLES
        )
    if cfg.kind is DataKind.hub and not isinstance(cfg.path, str):
        raise ConfigError("data.path", "must be the name of a data set", given=cfg.path)


def _refuse_unread(key: str, given: Any, kind: DataKind, reader: DataKind = DataKind.text) -> None:
    raise ConfigError(
        key,
        f"is not used by data={kind.value}",
        given=given,
        valid=f"data={reader.value} {key}={given}",
    )


def load_corpus(cfg: DataConfig, task: Task, tokenizer: PreTrainedTokenizerBase) -> Corpus:
    """Load the training documents and the held-out ones.

    Args:
        tokenizer: its chat template renders conversations.

    Raises:
        ConfigError: data is missing or empty, lacks the named columns, or its rows do not suit
            `task`, `data.loss_on` or the chat template.
    """
    check_source(cfg)
    assert cfg.kind is not DataKind.self  # `surgery.data.own_text` makes these
    if cfg.kind is DataKind.stdlib:
        return _load_stdlib(cfg, task)
    train, held_out = _load_text(cfg) if cfg.kind is DataKind.text else _load_hub(cfg)
    train, whole = _read_texts(train, cfg, task, tokenizer)
    if held_out is None:
        fraction = cfg.val_fraction
        corpus = Corpus(
            train=_select_share(train, fraction=fraction, held_out=False),
            held_out=_select_share(train, fraction=fraction, held_out=True),
            whole=whole,
            shared=True,
        )
        _refuse_blank("data.path", cfg.path, corpus.train, corpus.held_out)
        return corpus
    held_out, _ = _read_texts(held_out, cfg, task, tokenizer)
    corpus = Corpus(
        train=_select_share(train, fraction=0.0, held_out=False),
        held_out=_select_share(held_out, fraction=1.0, held_out=True, key="data.val_path"),
        whole=whole,
    )
    _refuse_blank("data.path", cfg.path, corpus.train)
    _refuse_blank("data.val_path", cfg.val_path, corpus.held_out)
    return corpus


def load_held_out(
    cfg: DataConfig, task: Task, tokenizer: PreTrainedTokenizerBase
) -> tuple[Documents, bool]:
    """Load the documents of `data.val_path` alone, and say whether they are whole (`Corpus`).

    Raises:
        ConfigError: as of `load_corpus`.
    """
    check_source(cfg)
    documents = _read_files(_resolve_held_out_files(cfg), False, "data.val_path", cfg)
    documents, whole = _read_texts(documents, cfg, task, tokenizer)
    rows = _select_share(documents, fraction=1.0, held_out=True, key="data.val_path")
    _refuse_blank("data.val_path", cfg.val_path, rows)
    return rows, whole


def _read_texts(
    documents: Documents, cfg: DataConfig, task: Task, tokenizer: PreTrainedTokenizerBase
) -> tuple[Documents, bool]:
    """Make rows of text out of the named columns, and say whether a chat template made them."""
    columns = {cfg.text_column: TEXT}
    others = {}
    if cfg.completion_column is not None:
        others[COMPLETION] = ("data.completion_column", cfg.completion_column)
    if task is Task.sequence_classification:
        others[LABEL] = ("data.label_column", cfg.label_column)
    for name, (key, column) in others.items():
        if column in columns:
            raise ConfigError(
                key,
                "must be another column than the others",
                given=column,
                valid="a column of its own",
            )
        columns[column] = name
    documents = _select_columns(documents, cfg, columns)
    with reading("data.path"):
        conversations = has_messages(documents)
    plain = not conversations and cfg.completion_column is None
    if plain and cfg.loss_on is LossOn.assistant:
        raise ConfigError(
            "data.loss_on",
            f"nothing says what the assistant's part is: data.text_column={cfg.text_column} holds "
            "plain text",
            given=cfg.loss_on.value,
            valid="all; or a column of conversations, or data.completion_column",
        )
    if plain:
        return documents, False
    if task is not Task.causal_lm:
        raise ConfigError(
            "data.completion_column" if cfg.completion_column else "data.text_column",
            f"conversations and completions are for causal_lm, not for {task.value}",
            given=cfg.completion_column or cfg.text_column,
            valid="a column of text",
        )
    with reading("data.path"):
        rows = render_rows(documents, tokenizer, cfg, conversations=conversations)
    return rows, conversations


def _refuse_blank(key: str, given: Any, *halves: Documents) -> None:
    if not any(isinstance(half, datasets.IterableDataset) or len(half) for half in halves):
        raise ConfigError(key, "has no text: every document is blank", given=given)


def _select_share(
    documents: Documents, *, fraction: float, held_out: bool, key: str = "data.path"
) -> Documents:
    options = {"fraction": fraction, "held_out": held_out}
    try:
        return documents.filter(
            _mark_share,
            batched=True,
            input_columns=[TEXT],
            fn_kwargs=options,
            **make_fingerprint(documents, "share", options),
        )
    except UnicodeDecodeError as error:  # the first look at text that a reader passed on unread
        raise ConfigError(key, f"cannot be read: {error}", valid="text in UTF-8") from None


def _mark_share(texts: list[Any], *, fraction: float, held_out: bool) -> list[bool]:
    """Mark the texts that belong to this share; a blank or missing text belongs to none."""
    for text in texts:
        if text is not None and not isinstance(text, str):
            raise ConfigError(
                "data.text_column", "has a value that is not text", given=repr(text)[:60]
            )
    return [
        bool(text) and not text.isspace() and is_held_out(text, fraction) is held_out
        for text in texts
    ]


def is_held_out(key: str, fraction: float) -> bool:
    """Whether the document named `key` belongs to the held-out share.

    A hash decides, so the split does not depend on the order of documents or on a seed: the first
    eight bytes of SHA-256 of `key`, read as a number in [0, 1), must be below `fraction`.
    """
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction


def _load_stdlib(cfg: DataConfig, task: Task) -> Corpus:
    if task is Task.sequence_classification:
        raise ConfigError(
            "data", "the standard library has no labels", given="stdlib", valid="text, hub"
        )
    documents = read_stdlib(part=cfg.part)
    halves: dict[bool, list[str]] = {False: [], True: []}
    for path, text in documents.items():
        halves[is_held_out(path, cfg.val_fraction)].append(text)
    return Corpus(
        train=datasets.Dataset.from_dict({TEXT: halves[False]}),
        held_out=datasets.Dataset.from_dict({TEXT: halves[True]}),
        shared=True,
    )


def _resolve_halves(cfg: DataConfig) -> tuple[list[Path], list[Path]]:
    """Find the files to train on, and those held out; none of these: a share decides."""
    train = _resolve_files("data.path", cfg.path, "data.split", cfg.split)
    folders = [Path(os.path.expanduser(cfg.path))] if isinstance(cfg.path, str) else []
    wanted = cfg.val_split
    if cfg.val_path is not None:
        return train, _resolve_held_out_files(cfg)
    splits = [name for one in folders for name in saved.list_splits(one, "data.path")]
    if wanted is None and splits:
        wanted = saved.find_validation(folders[0], "data.path")
    if wanted is None:
        return train, []
    if not splits:
        raise ConfigError(
            "data.val_split",
            "data.path has no splits",
            given=wanted,
            valid="null, data.val_path, or a folder of a DatasetDict",
        )
    return train, _resolve_files("data.path", cfg.path, "data.val_split", wanted)


def _resolve_held_out_files(cfg: DataConfig) -> list[Path]:
    """Find the files of `data.val_path`."""
    wanted = cfg.val_split
    if wanted is None and isinstance(cfg.val_path, str):
        held_out = Path(os.path.expanduser(cfg.val_path))
        wanted = saved.find_validation(held_out, "data.val_path")
    return _resolve_files("data.val_path", cfg.val_path, "data.val_split", wanted)


def _resolve_files(key: str, given: Any, split_key: str, split: str | None) -> list[Path]:
    """Find the files that are named, or that the named folders of saved data sets hold."""
    types = ", ".join(_READERS)
    names = given if isinstance(given, (list, tuple)) else [given]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(
            key, "must be a file", given=given, valid=f"one path or a list of paths ({types})"
        )
    paths: list[Path] = []
    for path in (Path(os.path.expanduser(name)) for name in names):
        # Unlike pathlib, `os.path` answers "no" for any text.
        if os.path.isdir(path):
            if not saved.is_saved(path):
                raise ConfigError(
                    key,
                    "is a folder, and `save_to_disk` of datasets did not write it",
                    given=str(path),
                    valid=f"a file or a list of files ({types}), or the folder of a saved data set",
                )
            paths += saved.list_files(path, split, key, split_key)
            continue
        if not os.path.isfile(path):
            raise ConfigError(
                key, "there is no such file", given=str(path), valid=f"a file: {types}"
            )
        if path.suffix not in _READERS:
            raise ConfigError(key, "unknown file type", given=str(path), valid=_READERS)
        if path.stat().st_size == 0:
            raise ConfigError(
                key, "the file is empty", given=str(path), valid="a file with text in it"
            )
        paths.append(path)
    if len({_get_reader(path) for path in paths}) > 1:
        raise ConfigError(
            key,
            "all files must be of the same type",
            given=list(map(str, names)),
            valid=f"all of one type: {types}",
        )
    return paths


def _get_reader(path: Path) -> str:
    return "arrow" if path.suffix == saved.SUFFIX else _READERS[path.suffix]


def _check_content(key: str, path: Path) -> None:
    """Refuse what the readers of `datasets` would unpack, or could end the process on."""
    archive = Extractor.infer_extractor_format(path)
    if archive:
        raise ConfigError(
            key, f"the file is compressed ({archive})", given=str(path), valid="an unpacked file"
        )
    fault = find_unreadable(path) if _get_reader(path) == "json" else None
    if fault is not None:
        raise ConfigError(
            key, f"cannot be read: {fault}", given=str(path), valid="rows that are objects"
        )


def _load_text(cfg: DataConfig) -> tuple[Documents, Documents | None]:
    paths, held_out_paths = _resolve_halves(cfg)
    size_gb = sum(path.stat().st_size for path in paths) / 1e9
    streamed = cfg.streaming is Streaming.always or (
        cfg.streaming is Streaming.auto and size_gb > cfg.stream_above_gb
    )
    train = _read_files(paths, streamed, "data.path", cfg)
    if not held_out_paths:
        return train, None
    return train, _read_files(held_out_paths, False, "data.val_path", cfg)


def _read_files(files: list[Path], stream: bool, key: str, cfg: DataConfig) -> Documents:
    for path in files:
        with reading(key):
            _check_content(key, path)
    reader = _get_reader(files[0])
    options = {"sample_by": cfg.sample_by} if reader == "text" else {}
    with reading(key):
        return datasets.load_dataset(
            reader,
            name=_hash_file_versions(files),
            data_files=[glob.escape(str(path)) for path in files],
            split="train",
            streaming=stream,
            **options,
        )


def _hash_file_versions(files: Iterable[Path]) -> str:
    """Make a cache name for the present state of the files.

    `datasets` by itself looks only at the time of the last change, which can go back when an
    archive is unpacked.
    """
    stats = [(str(path), path.stat()) for path in files]
    now = [(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in stats]
    return hashlib.sha256(repr(now).encode()).hexdigest()[:16]


def _load_hub(cfg: DataConfig) -> tuple[Documents, Documents | None]:
    def read(split: str | None, key: str) -> Documents:
        with reading("data.path", split_key=key):
            return datasets.load_dataset(
                cfg.path,
                cfg.name,
                split=split,
                revision=cfg.revision,
                streaming=cfg.streaming is Streaming.always,
            )

    train = read(cfg.split, "data.split")
    return train, read(cfg.val_split, "data.val_split") if cfg.val_split else None


@contextmanager
def reading(key: str, split_key: str | None = None) -> Iterator[None]:
    """Turn whatever goes wrong inside `datasets` into a `ConfigError` of `key`."""
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the error says it, once
    try:
        yield
    except SurgeryError:
        raise
    except Exception as error:  # the readers of `datasets` raise errors of any class
        lines = str(error.__cause__ or error).splitlines() or [type(error).__name__]
        if "corresponds to no data" in lines[0]:
            raise ConfigError(key, "has no documents") from None
        if split_key is not None and "split" in lines[0].lower():
            raise ConfigError(split_key, lines[0]) from None
        raise ConfigError(key, f"cannot be read: {lines[0]}") from None
    finally:
        datasets.logging.set_verbosity(verbosity)


def _select_columns(documents: Documents, cfg: DataConfig, wanted: dict[str, str]) -> Documents:
    """Keep the wanted columns and give them this module's names."""
    present = documents.column_names
    if not present:  # a stream that does not know its columns, or no rows at all
        with reading("data.path"):
            present = list(next(iter(documents), {}))
        if not present:
            raise ConfigError("data.path", "has no documents", given=cfg.path)
    keys = {
        TEXT: "data.text_column",
        COMPLETION: "data.completion_column",
        LABEL: "data.label_column",
    }
    for column, name in wanted.items():
        if column not in present:
            raise ConfigError(
                keys[name],
                "the data has no such column",
                given=column,
                valid=present,
            )
    documents = documents.select_columns(list(wanted))
    # Other names on the way: one column may have the name that another one gets.
    for names in ({c: f"_{n}" for c, n in wanted.items()}, {f"_{n}": n for n in wanted.values()}):
        documents = documents.rename_columns(names)
    return documents
