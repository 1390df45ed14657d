"""Real text on every machine: the source files of Python's standard library."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

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


def stdlib_documents(root: Path | None = None) -> dict[str, str]:
    """Source text by path relative to the library's root, in path order.

    Files that are not valid UTF-8, and blank ones, are left out.
    """
    root = root or stdlib_root()
    documents = {}
    for path in sorted(_sources(root)):
        try:
            text = path.read_bytes().decode("utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip():
            documents[path.relative_to(root).as_posix()] = text
    return documents


def _sources(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        yield from (Path(folder, name) for name in files if name.endswith(".py"))
