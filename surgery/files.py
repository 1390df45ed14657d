"""Write files that are complete or absent, and read JSON of others in bounded time and memory."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

# Ends the name of what is being written; a run removes what an earlier one left of these.
DRAFT = ".partial"

# Names the folder of what runs keep for later runs; else it is beside those of other programs.
CACHE_VARIABLE = "ATTENTION_SURGERY_CACHE"

# The deepest file that this project, or a model of transformers, writes has about 10 levels.
MOST_NESTED = 100
_MOST_BYTES = 256_000_000
_CHUNK = 1 << 22
_STRING = re.compile(rb'"[^"]*+(?:"|\Z)')
# As int8: one level more, one less; and 0 for null, by its first letter.
_STEPS = bytes.maketrans(b"[{]}n", b"\x01\x01\xff\xff\x00")
_DROPPED = bytes(set(range(256)) - set(b"[{]}n"))


def find_cache_folder() -> Path:
    """Find the folder of what runs keep for later runs. It may not exist yet."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser() / "attention-surgery"


@contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` to write to; what is there is renamed to `path` at the end.

    If writing fails, nothing is left, and `path` is what it was.
    """
    draft = path.with_name(path.name + DRAFT)
    try:
        yield draft
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file beside `path`, then rename it to `path`."""
    with write_whole(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def write_table(path: Path, table: Any) -> None:
    """Write a pyarrow table as Parquet."""
    from pyarrow import parquet  # takes seconds where it is not imported yet

    with write_whole(path) as draft:
        parquet.write_table(table, draft)


def write_picture(path: Path, figure: Any, **options: Any) -> None:
    """Write a matplotlib figure, in the format that the suffix of `path` says."""
    with write_whole(path) as draft:
        figure.savefig(draft, format=path.suffix.removeprefix("."), **options)


def read_json(path: Path) -> Any:
    """Read a JSON file that may be damaged or hostile.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON in UTF-8, or is too large or too deeply nested to be meant.
    """
    if path.exists() and not path.is_file() and not path.is_dir():  # reading would not end
        raise ValueError("it is not a regular file")
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"it is larger than {_MOST_BYTES // 10**6} MB")
    if exceeds_nesting(path):
        raise ValueError(f"it is nested more than {MOST_NESTED} levels deep")
    return json.loads(path.read_text(encoding="utf-8"))


def find_unreadable(path: Path) -> str | None:
    """Find what would end the process of a reader of JSON rows; ``None`` if there is nothing.

    pyarrow recurses into nested rows, and takes a first row of ``null`` for a pointer.
    """
    levels, bare = _scan_brackets(path)
    if levels > MOST_NESTED:
        return f"it is nested more than {MOST_NESTED} levels deep"
    return "a row is not an object" if bare else None


def exceeds_nesting(path: Path) -> bool:
    """Whether brackets outside strings are nested more than `MOST_NESTED` levels deep."""
    return _scan_brackets(path)[0] > MOST_NESTED


def _scan_brackets(path: Path) -> tuple[int, bool]:
    """Find how deep brackets are nested, and whether there is a ``null`` outside of them.

    This looks at the bytes alone, in bounded memory, and stops once they are too deep.
    """
    depth, most, bare, inside, rest = 0, 0, False, False, b""
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            chunk = (b'"' if inside else b"") + rest + chunk
            # A backslash at the end belongs to what follows.
            rest = b"\\" if (len(chunk) - len(chunk.rstrip(b"\\"))) % 2 else b""
            chunk = chunk.removesuffix(rest).replace(b"\\\\", b"").replace(b'\\"', b"")
            inside = chunk.count(b'"') % 2 == 1
            kept = _STRING.sub(b"", chunk).translate(_STEPS, _DROPPED)
            if kept:
                steps = np.frombuffer(kept, np.int8)
                levels = depth + np.cumsum(steps, dtype=np.int64)
                depth, most = int(levels[-1]), max(most, int(levels.max()))
                bare = bare or bool((levels[steps == 0] <= 0).any())
                if most > MOST_NESTED:
                    break
    return most, bare
