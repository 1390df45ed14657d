"""Where finished cells are kept: JSON lines that only grow, so that a run can be cut off."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class Store:
    """Lines {"cell": …} and {"run": …} (command, machine, versions). Several may write at once.

    A line without its end was being written when its process died: it is not read, and the next
    one takes its place.

    Args:
        key_of: of a record, the key of its cell.
    """

    def __init__(self, path: Path, key_of: Callable[[Mapping[str, Any]], str]) -> None:
        self.path = path
        self._key_of = key_of

    def append(self, name: str, entry: Mapping[str, Any]) -> None:
        line = json.dumps({name: entry}, allow_nan=False).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            kept = file.read()
            file.truncate(kept.rfind(b"\n") + 1)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def cells(self) -> dict[str, dict[str, Any]]:
        """Records by cell key; the last one counts."""
        return {self._key_of(record): record for record in self._entries("cell")}

    def runs(self) -> list[dict[str, Any]]:
        """Which commands on which machines it all comes from, each once."""
        entries = self._entries("run")
        return [run for number, run in enumerate(entries) if run not in entries[:number]]

    def _entries(self, name: str) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        *lines, _ = self.path.read_bytes().split(b"\n")
        entries = [json.loads(line) for line in lines]
        return [entry[name] for entry in entries if name in entry]
