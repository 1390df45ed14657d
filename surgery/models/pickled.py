"""Look into pickled weights (`pytorch_model.bin`) before a loader does.

torch's `weights_only` reader runs no code of the file: it builds tensors and plain containers. What
it does not bound is their size, so that is done here: a tensor may repeat its storage, and the zip
around it may be compressed.
"""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from surgery.errors import join_lines

# The pickle holds names and shapes; a tensor takes some hundred bytes of it.
_MOST_PICKLE_BYTES = 64_000_000


def read_pickled_shapes(path: Path) -> dict[str, list[int]]:
    """Read name → shape of the tensors in a pickled file; once, as long as it does not change.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds something else than plain tensors by their names.
    """
    status = path.stat()
    return _read_once(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=64)
def _read_once(path: Path, changed: int, size: int) -> dict[str, list[int]]:
    if not os.path.isfile(path):  # reading would not end
        raise ValueError("it is not a regular file")
    zipped = zipfile.is_zipfile(path)
    if zipped:
        _check_zip(path, size)
    try:
        with warnings.catch_warnings(action="ignore"):  # of old pickles
            # Mapped: no weight is read, and none from beyond the end of the file.
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch raises whatever its reader stumbled over
        raise ValueError(_explain(error)) from None
    if not isinstance(state, dict) or not state:
        raise ValueError("it is not a dict of tensors")
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise ValueError("it names a tensor by something else than a text")
        problem = _find_fault(tensor)
        if problem is not None:
            raise ValueError(f"{name} {problem}")
    return {name: list(tensor.shape) for name, tensor in state.items()}


def _check_zip(path: Path, size: int) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise ValueError(join_lines(error)) from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("it is compressed, as torch never writes it")
    if sum(entry.file_size for entry in entries) > size:
        raise ValueError("it names more bytes than it holds")
    if any(e.filename.endswith("/data.pkl") and e.file_size > _MOST_PICKLE_BYTES for e in entries):
        raise ValueError(f"its pickle is larger than {_MOST_PICKLE_BYTES // 10**6} MB")


def _find_fault(tensor: Any) -> str | None:
    if not isinstance(tensor, torch.Tensor):
        return f"is of type {type(tensor).__name__}, not a tensor"
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    if not plain or tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        return "is not a plain dense tensor"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"has the shape {list(tensor.shape)}, and fewer values than that"
    return None


def _explain(error: Exception) -> str:
    text = re.sub(r"Weights only load failed.*?trusted source\.", "", join_lines(error))
    text = text.rpartition("WeightsUnpickler error: ")[2].strip()
    asked = re.search(r"GLOBAL ([\w.]+) (?:was not|whose)", text)
    if asked is not None:
        return f"its pickle asks for {asked[1]}, which is never run"
    return f"torch cannot read it: {text.partition('. ')[0][:200]}"
