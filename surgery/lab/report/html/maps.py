"""Figures of every head over the steps of training, made small enough for a page."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from surgery.lab.report.html.metrics import described

Array = npt.NDArray[np.float64]
_KEYS = ("step", "layer", "head")
# More than one can tell apart by a slider.
STEPS = 240
# Heavy-tailed above this: a few heads carry most of it, and linear steps would hide the others.
_TAIL = 8.0


def observed_maps(path: Path, room: int) -> dict[str, Any] | None:
    """`heads.parquet` as maps [steps, layers, heads], one series per metric.

    Where they take more than `room` bytes, values become coarser first (16 bits, then 8), then
    steps are left out evenly, the first and the last never.

    Returns:
        ``None`` where nothing was observed.
    """
    file = pq.ParquetFile(path)
    names = [name for name in file.schema_arrow.names if name not in _KEYS]
    keys = file.read(columns=list(_KEYS))
    step, layer, head = (keys[name].to_numpy() for name in _KEYS)
    if not len(step) or not names:
        return None
    steps, at_step = np.unique(step, return_inverse=True)
    layers, heads = int(layer.max()) + 1, int(head.max()) + 1
    metrics = []
    share = room // len(names)
    for name in names:
        values = file.read(columns=[name])[name].to_numpy().astype(np.float64)
        seen = np.isfinite(values)
        where = np.flatnonzero(np.bincount(at_step[seen], minlength=len(steps)))
        if not len(where):
            continue
        bits, count = precision(len(where), layers * heads, share)
        kept = where[_evenly(len(where), count)]
        place = np.full(len(steps), -1)
        place[kept] = np.arange(len(kept))
        rows = seen & (place[at_step] >= 0)
        dense = np.full((len(kept), layers, heads), np.nan)
        dense[place[at_step[rows]], layer[rows], head[rows]] = values[rows]
        shown = [int(x) for x in steps[kept]]
        metrics.append(encoded(name, dense, bits) | {"steps": shown, "observed": len(where)})
    if not metrics:
        return None
    return {"title": "while training", "layers": layers, "heads": heads, "metrics": metrics}


def fixed_maps(
    title: str, columns: Mapping[str, Sequence[Sequence[float | None]]], room: int
) -> dict[str, Any] | None:
    """Figures taken once, by metric, layer and head (rows may differ in length).

    Metrics that do not fit into `room` bytes any more are left out, and named under ``left_out``.

    Returns:
        ``None`` where there is nothing to show.
    """
    filled = {name: grid for name, grid in columns.items() if any(map(len, grid))}
    if not filled:
        return None
    layers = max(map(len, filled.values()))
    heads = max(len(row) for grid in filled.values() for row in grid)
    bits, _ = precision(1, layers * heads, room // len(filled))
    fitting = max(room // (layers * heads * bits // 8), 0)
    metrics = []
    for name in list(filled)[:fitting]:
        dense = np.full((1, layers, heads), np.nan)
        for number, row in enumerate(filled[name]):
            dense[0, number, : len(row)] = [np.nan if x is None else x for x in row]
        if np.isfinite(dense).any():
            metrics.append(encoded(name, dense, bits) | {"steps": [], "observed": 1})
    left_out = list(filled)[fitting:]
    return {
        "title": title,
        "layers": layers,
        "heads": heads,
        "metrics": metrics,
        "left_out": left_out,
    }


def precision(steps: int, heads: int, room: int) -> tuple[int, int]:
    """Bits per value and number of steps that fit into `room` bytes, at least one of the latter."""
    if 2 * heads * min(steps, STEPS) <= room:
        return 16, min(steps, STEPS)
    return 8, max(1, min(steps, STEPS, room // heads))


def encoded(name: str, values: Array, bits: int) -> dict[str, Any]:
    """A metric's values as whole numbers on a scale between its extremes, in base 64.

    The highest code says that there is no value. The scale is linear or, for heavy tails, that of
    asinh(value / width): linear around zero, logarithmic further out.

    Args:
        values: [steps, layers, heads]; NaN where there is none.
    """
    finite = values[np.isfinite(values)]
    low, high = float(finite.min()), float(finite.max())
    median = float(np.median(np.abs(finite)))
    width = median if median > 0 and max(-low, high) > _TAIL * median else 0.0
    scaled, bottom, top = (
        np.arcsinh(x / width) if width else np.asarray(x) for x in (values, low, high)
    )
    highest = 2**bits - 2
    span = float(top - bottom) or 1.0
    codes = np.where(np.isfinite(scaled), np.rint((scaled - bottom) / span * highest), highest + 1)
    raw = codes.astype("<u2" if bits == 16 else "u1").tobytes()
    return {
        **described(name),
        "bits": bits,
        "low": low,
        "high": high,
        "width": width,
        "codes": base64.b64encode(raw).decode("ascii"),
    }


def by_layer(heads: Sequence[Mapping[str, Any]], values: Sequence[Any]) -> list[list[Any]]:
    """One value per head, as rows by layer; ``None`` for heads that are not there."""
    rows: dict[int, dict[int, Any]] = {}
    for place, value in zip(heads, values, strict=True):
        rows.setdefault(int(place["layer"]), {})[int(place["head"])] = value
    return [list(_row(rows.get(layer, {}))) for layer in range(max(rows, default=-1) + 1)]


def _row(found: Mapping[int, Any]) -> Iterator[Any]:
    for head in range(max(found, default=-1) + 1):
        yield found.get(head)


def _evenly(count: int, wanted: int) -> npt.NDArray[np.int64]:
    """`wanted` of `count` places, evenly spread; the last one where only one is wanted."""
    if wanted == 1:
        return np.array([count - 1])
    return np.unique(np.rint(np.linspace(0, count - 1, wanted)).astype(np.int64))
