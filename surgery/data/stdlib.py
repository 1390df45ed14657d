"""Real text on every machine: the source files of Python's standard library."""

from __future__ import annotations

import sysconfig
from pathlib import Path

# What distributions leave out or put elsewhere, so that two machines see the same files.
SKIPPED_FOLDERS = {
    "__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests",
}


def stdlib_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def stdlib_documents(root: Path | None = None) -> dict[str, str]:
    """Source text by path relative to the library's root, in path order.

    Files that are not valid UTF-8, and empty ones, are left out.
    """
    root = root or stdlib_root()
    documents = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text:
            documents[relative.as_posix()] = text
    return documents
