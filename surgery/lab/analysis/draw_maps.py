"""`map-LAYER.HEAD-TEXT.png`: one head over one text, tokens on the axes."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from surgery.files import write_picture
from surgery.lab.analysis.draw_roles import format_role
from surgery.lab.analysis.maps import Map


def draw_map(attention: Map, role: str, path: Path) -> None:
    """Draw queries downwards and keys across; each row sums to 1."""
    count = len(attention.tokens)
    side = min(11.0, 1.6 + 0.19 * count)
    figure = Figure(figsize=(side + 0.9, side), dpi=140)
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    image = axes.imshow(attention.p.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    names = [_escape(token) for token in attention.tokens]
    size = max(4.5, min(8.0, 340 / count))
    # Byte tokens are so narrow that they need no rotation.
    upright = max(map(len, names)) <= 2
    axes.set_xticks(
        range(count), names, fontsize=size, rotation=0 if upright else 90, family="monospace"
    )
    axes.set_yticks(range(count), names, fontsize=size, family="monospace")
    axes.xaxis.tick_top()
    axes.tick_params(length=0, pad=2)
    axes.set_xticks([n - 0.5 for n in range(1, count)], minor=True)
    axes.set_yticks([n - 0.5 for n in range(1, count)], minor=True)
    axes.grid(which="minor", color="#f2f2ee", linewidth=0.5)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    layer, head = attention.head
    name = f"layer {layer}, head {head}" + (f": {format_role(role)}" if role else "")
    axes.set_title(name, fontsize=10, loc="left")
    axes.set_ylabel("from", fontsize=9)
    axes.set_xlabel("to", fontsize=9)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, aspect=25)
    bar.ax.tick_params(labelsize=7)
    bar.ax.yaxis.set_minor_locator(NullLocator())
    write_picture(path, figure)


def _escape(token: str) -> str:
    """Escape dollar signs: matplotlib reads text between two of them as mathematics."""
    return token.replace("$", r"\$")
