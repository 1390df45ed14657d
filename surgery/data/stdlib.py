"""Real text that every machine has: the source files of Python's standard library."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from surgery.config.schema import Part
from surgery.data.parts import extract_part

# Distributions leave these out or move them. Without them, all machines see the same files.
SKIPPED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "idle_test",
    "site-packages",
    "test",
    "tests",
}


def find_stdlib_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def read_stdlib(root: Path | None = None, part: Part = Part.all) -> dict[str, str]:
    """Read source text, or a part of it: path relative to the library's root → text, in order.

    Files that are blank or not valid UTF-8 are left out, and with a part also those that cannot
    be read as Python.
    """
    root = root or find_stdlib_root()
    documents = {}
    for path in sorted(_find_sources(root)):
        try:
            text = extract_part(path.read_bytes().decode("utf-8"), part)
        except (UnicodeDecodeError, OSError):
            continue
        if text is not None and text.strip():
            documents[path.relative_to(root).as_posix()] = text
    return documents


def _find_sources(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        yield from (Path(folder, name) for name in files if name.endswith(".py"))
