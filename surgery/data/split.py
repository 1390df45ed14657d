"""Which documents are held out: decided by a hash, so it never depends on order or on a seed."""

from __future__ import annotations

import hashlib


def is_held_out(key: str, fraction: float) -> bool:
    """Whether the document named `key` belongs to the held-out share.

    The first eight bytes of SHA-256 of `key`, read as a number in [0, 1), against `fraction`.
    """
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction
