"""The results file: all rows, done or not, with what the targets come to."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.real.sizes import Sizes
from benchmarks.real.store import Record, Records
from benchmarks.real.targets import list_targets
from benchmarks.results_file import FOLDER
from surgery.lab.report.summary import describe_machine, find_versions

MOST_SEEDS = 100
_KEPT = ("key", "seed", "status", "error", "figures", "costs", "wall_seconds", "date")


def name_results(name: str) -> Path:
    """Name the results file of a model: by the kind of machine, not by the machine."""
    kind = "cuda" if describe_machine()["gpu"] else "cpu"
    return FOLDER / f"real-{name}-{kind}.json"


def collect(
    records: Records, sizes: Sizes, command: str, earlier: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Put the results together from the files of the rows; those not run are in it, too.

    Args:
        earlier: results that were kept before; what they hold of the same rows, and has no file
            here, stays.
    """
    before = _list_earlier(earlier or {})
    rows: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    for name, row in records.rows.items():
        found = [
            record
            for seed in (range(MOST_SEEDS) if row.seeded else range(1))
            if (record := _find(records, name, seed, before)) is not None
        ]
        rows.append(
            {
                "name": name,
                "section": row.section,
                "what": row.what,
                "needs": list(row.needs),
                "seeded": row.seeded,
                "seen": row.seen,
                "commands": _show_commands(records, name),
                "records": [_pack(record, runs) for record in found],
            }
        )
    subject = records.places.subject
    by_name = {row["name"]: row for row in rows}
    return {
        "what": "every headline on a language model that people use",
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "model": {
            "name": subject.name,
            "override": subject.shown,
            "weights": subject.weights,
            "kv_heads": subject.kv_heads,
            "width": subject.width,
            "positions": subject.positions,
        },
        "sizes": sizes.to_json(),
        "targets": list_targets(by_name, sizes),
        "rows": rows,
        "runs": runs,
        "machine": describe_machine(),
        "versions": find_versions(),
    }


def _find(
    records: Records, name: str, seed: int, before: Mapping[tuple[str, int], Record]
) -> Record | None:
    if records.find_path(name, seed).is_file() and (found := records.read(name, seed)):
        return found
    kept = before.get((name, seed))
    return kept if kept is not None and kept["key"] == records.make_key(name, seed) else None


def _pack(record: Record, runs: list[dict[str, Any]]) -> Record:
    """Leave out what is the same for many records: `run` is the number of machine and versions."""
    run = {"machine": record["machine"], "versions": record["versions"]}
    if run not in runs:
        runs.append(run)
    return {name: record.get(name) for name in _KEPT} | {"run": runs.index(run)}


def _list_earlier(earlier: Mapping[str, Any]) -> dict[tuple[str, int], Record]:
    """List records by row and seed, each with its machine and versions."""
    return {
        (row["name"], record["seed"]): record | earlier["runs"][record["run"]]
        for row in earlier.get("rows", ())
        for record in row["records"]
    }


def _show_commands(records: Records, name: str) -> list[str]:
    row, need = records.rows[name], records.find_need(name, 0)
    return [records.places.show(words, row, 0, need) for words in row.commands]


def hide_paths(given: Sequence[str], hidden: Sequence[str]) -> str:
    """The command line without the options that only say where things lie."""
    words, skip = [], False
    for word in given:
        if skip:
            skip = False
        elif word in hidden:
            skip = True
        elif word.partition("=")[0] not in hidden:
            words.append("DIR" if os.sep in word and Path(word).exists() else word)
    return " ".join(["python", "-m", "benchmarks.real", *words])
