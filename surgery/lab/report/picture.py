"""`result.png`: what surgery cost, what healing gave back, and what was saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from surgery.files import write_picture
from surgery.lab.report.figures import MOMENT_NAMES
from surgery.lab.report.summary import MOMENTS
from surgery.units import format_bytes

_COLOURS = {"before": "#4c6a92", "after_surgery": "#c8553d", "after_training": "#588157"}


def draw_result(summary: Mapping[str, Any], path: Path) -> None:
    """Held-out loss, the training curve, KV cache and decoding time, in one row."""
    moments = [moment for moment in MOMENTS if summary.get(moment)]
    figure = Figure(figsize=(11, 3.2), dpi=150)
    figure.set_layout_engine("constrained")
    loss, curve, cache, decode = figure.subplots(1, 4, width_ratios=[1, 1.6, 1, 1])

    _bars(loss, summary, moments, "loss", "held-out loss (nats/token)", "{:.2f}".format)
    _bars(cache, summary, moments, "kv_bytes_per_token", "KV cache per token", format_bytes)
    _bars(decode, summary, moments, "decode_ms", "decode (ms/token)", "{:.2f}".format)

    points = (summary.get("training") or {}).get("curve") or []
    curve.plot([p[0] for p in points], [p[1] for p in points], color="#588157", linewidth=1.2)
    for moment in ("before", "after_surgery"):
        if summary.get(moment):
            level = summary[moment]["loss"]
            curve.axhline(level, color=_COLOURS[moment], linestyle=":", linewidth=1)
            label = f"{moment.replace('_', ' ')} (held out)"
            curve.annotate(
                label,
                (1, level),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                fontsize=7,
                color=_COLOURS[moment],
            )
    curve.set_title("training loss", fontsize=10)
    curve.set_xlabel("step", fontsize=8)
    for axes in (loss, curve, cache, decode):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    write_picture(path, figure)


def _bars(
    axes: Any, summary: Mapping[str, Any], moments: list[str], field: str, title: str, shown: Any
) -> None:
    axes.set_title(title, fontsize=10)
    present = [m for m in moments if summary[m].get(field) is not None]
    bars = axes.bar(
        [MOMENT_NAMES[m].replace(" ", "\n") for m in present],
        [summary[m][field] for m in present],
        color=[_COLOURS[m] for m in present],
        width=0.6,
    )
    axes.bar_label(bars, [shown(summary[m][field]) for m in present], fontsize=8, padding=2)
    axes.margins(y=0.15)
