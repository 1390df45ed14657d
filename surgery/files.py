"""Write files that are complete or absent, never half written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Ends the name of what is being written; a run removes what an earlier one left of these.
DRAFT = ".partial"


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
