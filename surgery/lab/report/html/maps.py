"""Figures of every head over the steps of training, made small enough for a page."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

Array = npt.NDArray[np.float64]
_KEYS = ("step", "layer", "head")
# More than one can tell apart by a slider.
STEPS = 240
# Heavy-tailed above this: a few heads carry most of it, and linear steps would hide the others.
_TAIL = 8.0
# metric → label, unit, note
_METRICS = {
    "head_importance": ("importance", "", "how much the loss hangs on the head's gate"),
    "attention_entropy": ("entropy", "nats", "of the attention weights, mean over query rows"),
    "normalized_entropy": ("entropy, normalised", "", "as a share of what uniform attention has"),
    "max_logit": ("largest logit", "", "scaled and masked, before the softmax"),
    "saturation": ("saturation", "", "of the softmax"),
    "confidence": ("confidence", "", "largest weight of a row, mean over query rows"),
    "first_token": ("mass on the first token", "", "share of attention"),
    "previous_token": ("mass on the previous token", "", "share of attention"),
    "own_token": ("mass on the token itself", "", "share of attention"),
    "same_token": ("mass on equal tokens", "", "share of attention"),
    "induction": ("mass on the induction target", "", "share of attention"),
    "distance": ("distance", "tokens", "mean distance attended over"),
    "output_norm": ("output norm", "", "of the head's part of the output projection's input"),
    "contribution_norm": ("contribution", "", "norm of what the head adds to the residual stream"),
    "redundancy": ("redundancy", "", "share of its output that the layer's other heads could say"),
}


def read_maps(path: Path, room: int) -> dict[str, Any] | None:
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
    for name in names:
        values = np.full((len(steps), layers, heads), np.nan)
        values[at_step, layer, head] = file.read(columns=[name])[name].to_numpy()
        seen = np.flatnonzero(np.isfinite(values).any(axis=(1, 2)))
        if len(seen):
            bits, count = choose_precision(len(seen), layers * heads, room // len(names))
            kept = seen[_spread_evenly(len(seen), count)]
            when = {"steps": steps[kept].tolist(), "observed": len(seen)}
            metrics.append(encode_metric(name, values[kept], bits) | when)
    found = {"title": "while training", "layers": layers, "heads": heads, "metrics": metrics}
    return found if metrics else None


def pack_maps(
    title: str,
    places: Sequence[tuple[int, int]],
    columns: Mapping[str, Sequence[float | None]],
    room: int,
) -> dict[str, Any] | None:
    """Figures taken once: metric → one for each of the `places` (layer, head).

    Metrics that do not fit into `room` bytes any more are left out, and named under ``left_out``.

    Returns:
        ``None`` where there is nothing to show.
    """
    if not columns:
        return None
    layer, head = zip(*places, strict=True)
    layers, heads = max(layer) + 1, max(head) + 1
    bits, _ = choose_precision(1, layers * heads, room // len(columns))
    fitting = max(room // (layers * heads * bits // 8), 0)
    metrics = []
    for name in list(columns)[:fitting]:
        values = np.full((1, layers, heads), np.nan)
        values[0, layer, head] = np.array(columns[name], dtype=np.float64)  # None becomes NaN
        if np.isfinite(values).any():
            metrics.append(encode_metric(name, values, bits) | {"steps": [], "observed": 1})
    found = {"title": title, "layers": layers, "heads": heads, "metrics": metrics}
    return {**found, "left_out": list(columns)[fitting:]}


def choose_precision(steps: int, heads: int, room: int) -> tuple[int, int]:
    """Bits per value and number of steps that fit into `room` bytes, at least one of the latter."""
    if 2 * heads * min(steps, STEPS) <= room:
        return 16, min(steps, STEPS)
    return 8, max(1, min(steps, STEPS, room // heads))


def encode_metric(name: str, values: Array, bits: int) -> dict[str, Any]:
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
    text = base64.b64encode(codes.astype("<u2" if bits == 16 else "u1").tobytes()).decode("ascii")
    label, unit, note = _METRICS.get(name, (name.replace("_", " "), "", ""))
    about = {"name": name, "label": label, "unit": unit, "note": note, "bits": bits}
    return {**about, "low": low, "high": high, "width": width, "codes": text}


def _spread_evenly(count: int, wanted: int) -> npt.NDArray[np.int64]:
    """`wanted` of `count` places, evenly spread; the last one where only one is wanted."""
    if wanted == 1:
        return np.array([count - 1])
    return np.unique(np.rint(np.linspace(0, count - 1, wanted)).astype(np.int64))
