"""Cache names for `datasets`: the same work gets the same name, different work a different one.

The names that `datasets` makes by itself are hashes of the pickled function. They fail in two
ways here. A tokenizer pickles differently after its first call, so every run would write a new
copy. A function of this package is pickled by its name only, so a new version of the package
would read what an old version wrote.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase


def make_fingerprint(documents: Any, *work: Any) -> dict[str, str]:
    """Make the option `new_fingerprint` for `work` (plain JSON) on `documents`.

    A stream is not cached: the result is empty.
    """
    if not isinstance(documents, datasets.Dataset):
        return {}
    parts = json.dumps([documents._fingerprint, _hash_source_code(), *work])
    return {"new_fingerprint": hashlib.sha256(parts.encode()).hexdigest()[:16]}


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash all files that `save_pretrained` writes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # forget the settings of the last call; every call sets them again
        backend.no_truncation()
        backend.no_padding()
    digest = hashlib.sha256(type(tokenizer).__name__.encode())
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@cache
def _hash_source_code() -> str:
    """Hash the source files of this folder."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
