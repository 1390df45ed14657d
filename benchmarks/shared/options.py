"""The words that the commands of several grids share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.shared.command import without
from surgery.lab.report.summary import describe_machine, find_versions

T = TypeVar("T")


def add_common(
    parser: argparse.ArgumentParser, kinds: Iterable[str], places: Sequence[str]
) -> None:
    """Args: kinds: all models there are. places: what the command writes."""
    add = parser.add_argument
    add("--quick", action="store_true", help="a tiny model and few cells, kept apart")
    add("--kinds", nargs="+", choices=dict.fromkeys(kinds))
    add("--seeds", nargs="+", type=int)
    add("--models-only", action="store_true", help="train the models that are absent, then stop")
    add("--again", action="store_true", help="measure anew what is chosen, though it is there")
    add("--budget-minutes", type=float, default=math.inf, help="nothing begins after so long")
    add("--workers", type=int, default=1, help="processes side by side")
    add("--threads", type=int, default=1, help="of each process")
    add("--render", action="store_true", help="draw only")
    add("--store", type=Path, help="JSON lines, one per finished cell")
    add("--models", type=Path, help="folder of the models that are trained here")
    for name in places:
        add(f"--{name}", type=Path, help=f"where the {name} goes")


def targets(kind: type[T], options: argparse.Namespace, home: Path) -> T:
    """Where the results go, a `NamedTuple` of paths; a try-out has its own."""
    fields: Sequence[str] = kind._fields  # type: ignore[attr-defined]
    usual: Any = kind()
    if options.quick:  # overwrites no result
        usual = kind(*(home / path.name for path in usual))
    return kind(*(getattr(options, name) or getattr(usual, name) for name in fields))


def run_of(
    module: str, given: Sequence[str], options: argparse.Namespace, places: Sequence[str]
) -> dict[str, Any]:
    """For the store: the command less where things lie, and the machine."""
    hidden = {"--store", "--models", *(f"--{name}" for name in places)}
    return {
        "command": " ".join(["python", "-m", module, *without(hidden, given)]),
        "workers": options.workers,
        "machine": describe_machine(),
        "versions": find_versions(),
    }
