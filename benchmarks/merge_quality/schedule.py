"""This grid's cells, done in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.merge_quality.grid import Cell
from benchmarks.shared import schedule
from benchmarks.shared.schedule import DivergedError, RefusedError
from benchmarks.shared.store import Store

__all__ = ["DivergedError", "RefusedError", "go"]


def go(
    todo: Sequence[Cell], store: Store, measure: Callable[[Cell], dict[str, Any]], **options: Any
) -> dict[str, str]:
    """See `benchmarks.shared.schedule.go`."""
    return schedule.go(todo, store, measure, change=_conversion, said=_said, **options)


def _conversion(cell: Cell) -> str:
    return f"{cell.kind} {cell.merge} {cell.ratio}"


def _said(record: dict[str, Any]) -> str:
    return f"loss {record['loss']:.4f}, KL {record['kl']:.4f}"
