"""Finished rows, a JSON file for each row and seed, so that a run can be cut off at any time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.real.perform import Places
from benchmarks.real.rows import Row
from surgery.files import write_json

# To be raised when what is read from a run, or what a run does, has changed its meaning.
EDITION = 1
Record = dict[str, Any]


@dataclass(frozen=True)
class Records:
    """The records of one model.

    Attributes:
        rows: all of them, by name.
        folder: of the files.
    """

    rows: Mapping[str, Row]
    folder: Path
    places: Places

    def find_seed(self, name: str, seed: int) -> int:
        """Find the seed of a row that another row with this seed is about."""
        return seed if self.rows[name].seeded else 0

    def find_need(self, name: str, seed: int) -> Path | None:
        """Find the folder of the row that this one starts from; ``None`` if there is none."""
        needs = self.rows[name].needs
        return self.places.find(needs[0], self.find_seed(needs[0], seed)) if needs else None

    def make_key(self, name: str, seed: int) -> str:
        """Hash what a record depends on: its commands, its model, and the rows it starts from."""
        row = self.rows[name]
        parts = [
            EDITION,
            self.places.subject.weights,
            row.commands,
            seed,
            [self.make_key(need, self.find_seed(need, seed)) for need in row.needs],
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def find_path(self, name: str, seed: int) -> Path:
        return self.folder / f"{name}-{seed}.json"

    def read(self, name: str, seed: int) -> Record | None:
        """Read a record; ``None`` if there is none, or one of something else."""
        try:
            found = json.loads(self.find_path(name, seed).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        same = isinstance(found, dict) and found.get("key") == self.make_key(name, seed)
        return found if same else None

    def write(self, record: Record) -> None:
        name, seed = record["row"], record["seed"]
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.find_path(name, seed), {"key": self.make_key(name, seed), **record})

    def is_done(self, name: str, seed: int) -> bool:
        found = self.read(name, seed)
        return found is not None and found["status"] == "done"

    def has_kept(self, name: str, seed: int) -> bool:
        """Whether what other rows use of it is still there."""
        folder = self.places.find(name, seed)
        return all((folder / kept).exists() for kept in self.rows[name].keeps)
