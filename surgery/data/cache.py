"""Names for what `datasets` keeps on disk: the same work has the same name, other work another.

Its own names hash the transform's pickle. A tokenizer pickles differently after its first call,
so every run would write a new copy; and a function of this package is pickled by name only, so
a new version of the package would read what the old one wrote.
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


def fingerprinted(documents: Any, *work: Any) -> dict[str, str]:
    """The `new_fingerprint` option for `work` (plain JSON) on `documents`; none on a stream."""
    if not isinstance(documents, datasets.Dataset):
        return {}
    parts = json.dumps([documents._fingerprint, _code(), *work])
    return {"new_fingerprint": hashlib.sha256(parts.encode()).hexdigest()[:16]}


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that `save_pretrained` writes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # what the last call set; every call sets it anew
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
def _code() -> str:
    """This folder's source."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
