"""What the pages of several grids say alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NOTHING = "-"  # in a table, where nothing was measured


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def runs_said(runs: Sequence[Mapping[str, Any]], results: str) -> str:
    """Which commands on which machines the cells of `results` come from."""
    by_machine: dict[str, list[str]] = {}
    for run in runs:
        machine, versions = run["machine"], run["versions"]
        where = (
            f"{machine['cpu']}, {machine['cpus']} CPUs, {run['workers']} process(es) of "
            f"{machine['threads']} thread(s); Python {machine['python']}, torch "
            f"{versions['torch']}, transformers {versions['transformers']}:"
        )
        by_machine.setdefault(where, []).append(f"    {run['command']}")
    lines = [f"All cells are kept in `benchmarks/results/{results}`, with these runs.", ""]
    for where, commands in by_machine.items():
        lines += [where, "", *commands, ""]
    return "\n".join(lines)
