"""`roles.png`: layers downwards, heads across, a colour and a letter for what each head does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch
from matplotlib.ticker import MaxNLocator

from surgery.files import write_picture
from surgery.lab.analysis.roles import MIXED, ROLES

# Colours that colour-blind people can tell apart (after Okabe and Ito), and letters besides.
COLOURS = {
    "induction": "#d55e00",
    "duplicate_token": "#e69f00",
    "previous_token": "#0072b2",
    "positional": "#56b4e9",
    "syntactic": "#cc79a7",
    "first_token": "#009e73",
    "broadcast": "#b9b9b0",
    MIXED: "#ecece6",
}
LETTERS = {
    "induction": "I",
    "duplicate_token": "D",
    "previous_token": "P",
    "positional": "",
    "syntactic": "S",
    "first_token": "F",
    "broadcast": "B",
    MIXED: "",
}
_DARK = ("induction", "previous_token", "first_token")
# With more heads letters would overlap.
LETTERED = 40


def format_role(role: str) -> str:
    return role.replace("_", " ")


def draw_roles(result: Mapping[str, Any], path: Path) -> None:
    """Draw the roles of `heads.json`. A positional head shows its offset."""
    heads = result["heads"]
    layers = sorted({head["layer"] for head in heads})
    row_of = {layer: row for row, layer in enumerate(layers)}
    widest = max(head["head"] for head in heads) + 1
    cell = min(0.52, 11.0 / widest)
    size = (max(3.2, cell * widest) + 2.9, max(2.6, cell * len(layers) + 1.15))
    figure = Figure(figsize=size, dpi=150)
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    for head in heads:
        _draw_cell(axes, head, row_of[head["layer"]], lettered=widest <= LETTERED, size=cell)
    axes.set_xlim(-0.55, widest - 0.45)
    axes.set_ylim(len(layers) - 0.45, -0.55)
    axes.set_aspect("equal")
    axes.set_xlabel("head", fontsize=9)
    axes.set_ylabel("layer", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    if widest <= LETTERED:
        axes.set_xticks(range(widest))
    if len(layers) <= LETTERED:
        axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    axes.tick_params(labelsize=8, length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(
        f"What each head does: {_shorten(str(result['model']))}", fontsize=10, loc="left"
    )
    counts = Counter(head["role"] for head in heads)
    patches = [
        Patch(color=COLOURS[role], label=f"{_format_mark(role)}{format_role(role)}  {counts[role]}")
        for role in (*ROLES, MIXED)
        if counts[role]
    ]
    figure.legend(
        handles=patches,
        loc="outside right upper",
        frameon=False,
        fontsize=8.5,
        handlelength=1.1,
        handleheight=1.1,
    )
    # Else the label of an equal axis is cut.
    write_picture(path, figure, bbox_inches="tight", pad_inches=0.15)


def _draw_cell(
    axes: Axes, head: Mapping[str, Any], row: int, *, lettered: bool, size: float
) -> None:
    role, column = head["role"], head["head"]
    box = FancyBboxPatch(
        (column - 0.41, row - 0.41),
        0.82,
        0.82,
        boxstyle="round,pad=0,rounding_size=0.14",
        facecolor=COLOURS[role],
        edgecolor="none",
    )
    axes.add_patch(box)
    if lettered:
        text = f"{head['offset']:+d}" if role == "positional" else LETTERS[role]
        text = text.replace("-", "\u2212").replace("+0", "0")
        colour = "white" if role in _DARK else "#333333"
        axes.text(
            column, row, text, ha="center", va="center", color=colour, fontsize=min(10.0, 19 * size)
        )


def _format_mark(role: str) -> str:
    return f"{LETTERS[role]}  " if LETTERS[role] else ("±k  " if role == "positional" else "")


def _shorten(name: str) -> str:
    return name if len(name) <= 40 else f"…{name[-39:]}"
