"""`front.png`: what is lost at what cost, for a person to choose from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from surgery.files import write_picture


def draw_front(front: Sequence[Mapping[str, Any]], path: Path) -> None:
    """KL divergence against the share of the cost: each layer by itself, and all alike."""
    figure = Figure(figsize=(6, 3.6), dpi=150)
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    lines = (
        ("kl", "each layer by itself", "#588157", "o-"),
        ("uniform_kl", "all layers alike", "#c8553d", "s--"),
    )
    for name, label, colour, style in lines:
        points = sorted((one["share"], one[name]) for one in front if one[name] is not None)
        axes.plot(
            *zip(*points, strict=True) if points else ([], []), style, color=colour, label=label
        )
    axes.set_xlabel(f"{front[0]['cost']}, share of the original's", fontsize=9)
    axes.set_ylabel("KL from the original (nats)", fontsize=9)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8, frameon=False)
    write_picture(path, figure)
