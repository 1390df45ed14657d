"""Which model this is: enough to tell two apart, and cheap for the largest."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from surgery.models.packaged import PACKAGED
from surgery.models.source import ModelSource

_BLOCK = 1 << 20
_BLOCKS = 64


def identify_model(source: ModelSource) -> dict[str, Any]:
    """Collect name, architecture, revision and fingerprint of an original.

    A directory or file goes by its own name, wherever it lies. `revision` is the hub's commit,
    `fingerprint` that of local weights; ``None`` where there is no such thing.
    """
    config = source.load_config()
    where = None if source.spec.scratch is not None else Path(source.locate())
    local = where is not None and where.exists()
    packaged = source.spec.path in PACKAGED
    return {
        "name": where.name if local and where is not None and not packaged else source.name,
        "model_type": config.model_type,
        "revision": getattr(config, "_commit_hash", None) or source.spec.revision,
        "fingerprint": compute_fingerprint(where) if local and where is not None else None,
    }


def compute_fingerprint(where: Path) -> str:
    """Compute SHA-256 over the name, size and content of the weights: a file, or a directory's.

    Those are its ``*.safetensors``, or ``pytorch_model*.bin`` where it has none.

    Of a file above 64 MiB, 64 evenly spaced blocks of 1 MiB are read, its header among them. That
    tells models apart; it does not prove that a file is intact.
    """
    digest = hashlib.sha256()
    files = [where]
    if where.is_dir():
        files = sorted(where.glob("*.safetensors")) or sorted(where.glob("pytorch_model*.bin"))
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for offset in _list_offsets(size):
                file.seek(offset)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def _list_offsets(size: int) -> list[int]:
    if size <= _BLOCK * _BLOCKS:
        return list(range(0, size, _BLOCK))
    last = size - _BLOCK
    return [last * number // (_BLOCKS - 1) for number in range(_BLOCKS)]
