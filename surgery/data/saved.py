"""Find the files of a folder that `save_to_disk` of `datasets` wrote."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from surgery.errors import ConfigError
from surgery.files import read_json

SUFFIX = ".arrow"
# A `Dataset` has the first, a `DatasetDict` the second, with one folder per split.
_STATE, _SPLITS = "state.json", "dataset_dict.json"
_VALIDATION = ("validation", "val", "dev")


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    # Unlike pathlib, it answers "no" for any text.
    return os.path.isfile(folder / _STATE) or os.path.isfile(folder / _SPLITS)


def list_splits(folder: Path, key: str) -> list[str]:
    """List the splits of a `DatasetDict`; none for a `Dataset`.

    Raises:
        ConfigError: the folder's own list cannot be read.
    """
    if not os.path.isfile(folder / _SPLITS):
        return []
    splits = _read(folder / _SPLITS, "splits", key)
    return [split for split in splits if (folder / _name(folder, split, key)).is_dir()]


def find_validation(folder: Path, key: str) -> str | None:
    """Find the split that is there for validation; ``None`` if there is none."""
    splits = list_splits(folder, key)
    return next((name for name in _VALIDATION if name in splits), None)


def list_files(folder: Path, split: str | None, key: str, split_key: str) -> list[Path]:
    """List the files of a saved data set, in the order of its rows.

    Args:
        split: which one of a `DatasetDict`.
        key, split_key: the config keys of the folder and of the split.

    Raises:
        ConfigError: there is no such split, or files are missing or cannot be read.
    """
    splits = list_splits(folder, key)
    if splits:
        if split not in splits:
            raise ConfigError(
                split_key, f"{folder} has no such split", given=split, valid=", ".join(splits)
            )
        folder = folder / split
    if not (folder / _STATE).is_file():
        raise ConfigError(
            key, f"the data set was not saved whole: there is no {_STATE}", given=str(folder)
        )
    files = []
    for entry in _read(folder / _STATE, "_data_files", key):
        named = entry.get("filename") if isinstance(entry, dict) else entry
        file = folder / _name(folder, named, key)
        if not file.is_file() or file.suffix != SUFFIX:
            raise ConfigError(key, f"{_STATE} names a file that is not there", given=str(file))
        files.append(file)
    if not files:
        raise ConfigError(key, "has no documents", given=str(folder))
    return files


def _read(file: Path, name: str, key: str) -> list[Any]:
    try:
        held = read_json(file)[name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            key, f"{file.name} cannot be read: {type(error).__name__}", given=str(file)
        ) from None
    if not isinstance(held, list):
        raise ConfigError(key, f"{file.name} has no list of {name}", given=str(file))
    return held


def _name(folder: Path, name: Any, key: str) -> str:
    """Check that a name stays inside the folder."""
    if not isinstance(name, str) or Path(name).name != name or "\0" in name:
        raise ConfigError(
            key, f"{folder} names a file outside of it, or none", given=repr(name)[:60]
        )
    return name
