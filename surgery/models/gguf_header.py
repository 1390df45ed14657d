"""Read the header of a GGUF file in bounded time and memory.

The file is somebody else's: every count in it is held against the bytes that are there, before a
reader of another library loops over it. Layout: ggml's docs/gguf.md.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# Value type → its format, little-endian.
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_FORMATS[12] = "d"
_MOST_DIMENSIONS = 4
# Arrays of numbers up to this length are kept: one number per layer. Longer ones are vocabularies.
_MOST_KEPT = 10_000
_MOST_ALIGNMENT = 1 << 20


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file: shape in torch's order, number of its ggml type, place of its data."""

    shape: tuple[int, ...]
    ggml_type: int
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says before its data.

    Attributes:
        fields: key → number, text, or list of numbers; of other arrays their length.
        tensors: by their names in the file.
        data_bytes: from the first byte of the data to the end of the file.
    """

    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]
    data_bytes: int

    @property
    def architecture(self) -> str:
        return str(self.fields["general.architecture"])


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the header of a file; once, as long as the file does not change.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a whole header.
    """
    status = path.stat()
    return _read_once(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=8)
def _read_once(path: Path, changed: int, size: int) -> GgufHeader:
    if not path.is_file():  # reading would not end
        raise ValueError("it is not a regular file")
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Walk(content).read_header()


def check_extents(header: GgufHeader, sizes: Callable[[int], tuple[int, int] | None]) -> str | None:
    """Find a tensor that is not whole; ``None`` if there is none.

    Args:
        sizes: gives elements and bytes per block of a ggml type; ``None`` for an unknown type.
    """
    for name, tensor in header.tensors.items():
        block = sizes(tensor.ggml_type)
        if block is None:
            return f"{name} has the unknown type {tensor.ggml_type}"
        if tensor.shape[-1] % block[0]:
            return f"{name} has rows of {tensor.shape[-1]}, and blocks of {block[0]}"
        end = tensor.offset + prod(tensor.shape) // block[0] * block[1]
        if end > header.data_bytes:
            missing = end - header.data_bytes
            return f"the file is cut short: {name} needs {missing:,} bytes more than there are"
    return None


class _Walk:
    """A place in a file, which moves forward."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content, self._at = content, len(MAGIC)

    def read_header(self) -> GgufHeader:
        version = self._read("I")
        if version not in _VERSIONS:
            turned = int.from_bytes(struct.pack("<I", version), "big")
            what = "big-endian" if turned in _VERSIONS else f"of version {version}"
            raise ValueError(
                f"it is {what}, and only little-endian files of version 2 and 3 are read"
            )
        # A tensor takes 32 bytes or more, a field 13.
        tensors = self._read_count(32)
        fields: dict[str, Any] = {}
        for _ in range(self._read_count(13)):
            key = self._read_text()
            if key in fields:
                raise ValueError(f"{key} is there twice")
            fields[key] = self._read_value(self._read("I"))
        if not isinstance(fields.get("general.architecture"), str):
            raise ValueError("it has no general.architecture")
        found: dict[str, GgufTensor] = {}
        for _ in range(tensors):
            name = self._read_text()
            if name in found:
                raise ValueError(f"{name} is there twice")
            found[name] = self._read_tensor(name)
        alignment = fields.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= _MOST_ALIGNMENT:
            raise ValueError("its general.alignment is no size")
        start = -(-self._at // alignment) * alignment
        return GgufHeader(fields, found, max(0, len(self._content) - start))

    def _read_tensor(self, name: str) -> GgufTensor:
        dimensions = self._read("I")
        if not 0 < dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"{name} has {dimensions} dimensions")
        # ggml names the fastest dimension first.
        shape = tuple(self._read("Q") for _ in range(dimensions))[::-1]
        if 0 in shape:
            raise ValueError(f"{name} has no elements")
        return GgufTensor(shape, self._read("I"), self._read("Q"))

    def _read_value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._read_text()
        if kind != _ARRAY:
            return self._read(self._get_format(kind))
        kind = self._read("I")
        if kind == _STRING:
            count = self._read_count(8)
            for _ in range(count):
                self._skip(self._read("Q"))
            return count
        form = self._get_format(kind)
        count = self._read_count(struct.calcsize(form))
        if count > _MOST_KEPT:
            self._skip(count * struct.calcsize(form))
            return count
        return [self._read(form) for _ in range(count)]

    @staticmethod
    def _get_format(kind: int) -> str:
        if kind not in _FORMATS:
            raise ValueError(f"a field has the unknown type {kind}")
        return _FORMATS[kind]

    def _read(self, form: str) -> Any:
        start = self._at
        self._skip(struct.calcsize(form))
        return struct.unpack_from(f"<{form}", self._content, start)[0]

    def _read_count(self, least_bytes: int) -> int:
        count: int = self._read("Q")
        if count * least_bytes > len(self._content) - self._at:
            raise ValueError("the file is cut short: it names more than it holds")
        return count

    def _read_text(self) -> str:
        size = self._read("Q")
        start = self._at
        self._skip(size)
        return self._content[start : self._at].decode("utf-8")

    def _skip(self, size: int) -> None:
        self._at += size
        if self._at > len(self._content):
            raise ValueError("the file is cut short")
