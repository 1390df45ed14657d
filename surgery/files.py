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

# The deepest file that this project, or a model of transformers, writes has about 10 levels.
MOST_NESTED = 100
_MOST_BYTES = 256_000_000
_CHUNK = 1 << 22
_STRING = re.compile(rb'"[^"]*+(?:"|\Z)')
# Brackets as int8: one level more, one less.
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[{]}"))


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
    from pyarrow import parquet  # half a second

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


def exceeds_nesting(path: Path) -> bool:
    """Whether brackets outside strings are nested more than `MOST_NESTED` levels deep.

    Parsers that recurse end the process on such a file, so this looks at the bytes alone, in
    bounded memory.
    """
    depth, inside, rest = 0, False, b""
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            chunk = (b'"' if inside else b"") + rest + chunk
            # A backslash at the end belongs to what follows.
            rest = b"\\" if (len(chunk) - len(chunk.rstrip(b"\\"))) % 2 else b""
            chunk = chunk.removesuffix(rest).replace(b"\\\\", b"").replace(b'\\"', b"")
            inside = chunk.count(b'"') % 2 == 1
            brackets = _STRING.sub(b"", chunk).translate(_STEPS, _NO_BRACKETS)
            if brackets:
                levels = depth + np.cumsum(np.frombuffer(brackets, np.int8), dtype=np.int64)
                if levels.max() > MOST_NESTED:
                    return True
                depth = int(levels[-1])
    return False
