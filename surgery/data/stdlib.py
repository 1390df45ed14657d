"""Real text on every machine: the source files of Python's standard library."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from surgery.config.schema import Part
from surgery.data.parts import part_of

# What distributions leave out or put elsewhere, so that two machines see the same files.
SKIPPED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "idle_test",
    "site-packages",
    "test",
    "tests",
}


def stdlib_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def stdlib_documents(root: Path | None = None, part: Part = Part.all) -> dict[str, str]:
    """Source text, or that part of it, by path relative to the library's root, in path order.

    Files that are not valid UTF-8, and blank ones, are left out; of a part, also those that cannot
    be read as Python.
    """
    root = root or stdlib_root()
    documents = {}
    for path in sorted(_sources(root)):
        try:
            text = part_of(path.read_bytes().decode("utf-8"), part)
        except (UnicodeDecodeError, OSError):
            continue
        if text is not None and text.strip():
            documents[path.relative_to(root).as_posix()] = text
    return documents


def _sources(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        yield from (Path(folder, name) for name in files if name.endswith(".py"))
