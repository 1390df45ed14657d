"""Healing rates: which suits a merge best, chosen on windows that no figure is taken from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from benchmarks.merge_quality.grid import Cell

Record = Mapping[str, Any]


def best(found: Mapping[Cell, Record]) -> dict[Cell, Record]:
    """Per model, merge and objective the record with the least loss on the tuning windows.

    Args:
        found: cells with a `rate` of their own.

    Returns:
        By the cell without one.
    """
    chosen: dict[Cell, Record] = {}
    for cell, record in found.items():
        plain = replace(cell, rate=None)
        if plain not in chosen or record["tuning_loss"] < chosen[plain]["tuning_loss"]:
            chosen[plain] = record
    return chosen
