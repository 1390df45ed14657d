"""The pictures, from the results file alone; one that has nothing to show is not drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.real.rows import AMOUNTS, ELIMINATION, ESTIMATORS, ORIGINAL, name_cut
from benchmarks.real.targets import compute_gap, compute_rise, get_median

Rows = Mapping[str, Mapping[str, Any]]

_CUT, _HEALED = "#c8553d", "#4c6a92"
_BY_ESTIMATOR = {
    "elimination": "#5b8c5a",
    "leave_one_out": "#c8553d",
    "gate_gradient": "#4c6a92",
    "output_norm": "#c9a227",
    "random": "#9aa0a8",
}
_LINES = ("#c8553d", "#4c6a92", "#c9a227", "#5b8c5a", "#8a6fa8", "#7f8794", "#2b2b2b", "#b07aa1")
_LOOKS = ("-", "--", ":")  # more lines than colours go on with the next look
_FLOOR = 1e-3  # nats: gaps below are drawn here


def draw_all(figures: Mapping[str, Any], name_picture: Callable[[str], Path]) -> dict[str, Path]:
    """Draw what there is; pictures that were there and would be empty now are removed.

    Args:
        name_picture: where a picture goes, by its name.

    Returns:
        The pictures by name.
    """
    rows: Rows = {row["name"]: row for row in figures["rows"]}
    drawn = {}
    for name, draw in _PICTURES.items():
        path, figure = name_picture(name), draw(rows)
        if figure is None:
            path.unlink(missing_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        drawn[name] = path
    return drawn


def _make_figure(width: float = 6.4, height: float = 3.6) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), dpi=150)
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _scale(axes: Any) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _style(number: int) -> dict[str, Any]:
    look = _LOOKS[number // len(_LINES) % len(_LOOKS)]
    return {"color": _LINES[number % len(_LINES)], "linestyle": look, "linewidth": 1.6}


def _draw_merges(rows: Rows) -> Figure | None:
    """Gap of each merge as cut and healed."""
    names = [name for name, row in rows.items() if row["section"] == "gqa"]
    names = [name for name in names if compute_gap(rows, name) is not None]
    if not names:
        return None
    figure, axes = _make_figure()
    for prefix, colour, label in (("", _CUT, "as cut"), ("heal-", _HEALED, "healed")):
        points = [(n, compute_gap(rows, f"{prefix}{name}")) for n, name in enumerate(names)]
        known = [(place, max(_FLOOR, gap)) for place, gap in points if gap is not None]
        if known:
            axes.plot(*zip(*known, strict=True), "o", color=colour, label=label, markersize=6)
    _scale(axes)
    labels = [rows[name]["what"].replace(", ", ",\n") for name in names]
    axes.set_xticks(range(len(names)), labels, fontsize=7)
    axes.margins(x=0.1)
    axes.set_ylabel("nats per token above the original's loss", fontsize=8)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _draw_pruning(rows: Rows) -> Figure | None:
    """Rise of the loss by share of heads; dashed as cut, solid with refit."""
    figure, axes = _make_figure()
    for estimator in (ELIMINATION, *ESTIMATORS):
        for refit, look in ((False, "--"), (True, "-")):
            points = [
                (amount, compute_rise(rows, name_cut(estimator, amount, refit)))
                for amount in AMOUNTS
            ]
            known = [(amount, 100 * rise) for amount, rise in points if rise is not None]
            if known:
                axes.plot(
                    *zip(*known, strict=True),
                    look,
                    color=_BY_ESTIMATOR[estimator],
                    marker="o",
                    markersize=3,
                    linewidth=1.6,
                    label=estimator + (", refit" if refit else ""),
                )
    if not axes.lines:
        return None
    axes.set_yscale("symlog", linthresh=1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}%"))
    axes.set_xticks(AMOUNTS, [f"{amount}%" for amount in AMOUNTS])
    axes.set_xlabel("heads that went", fontsize=8)
    axes.set_ylabel("loss above the original's", fontsize=8)
    axes.legend(frameon=False, fontsize=7, handlelength=3.5)
    return figure


def _draw_positions(rows: Rows) -> Figure | None:
    """Loss of each part of a long window, by kind of scaling."""
    figure, axes = _make_figure()
    names = [name for name, row in rows.items() if row["section"] == "rope"]
    for number, name in enumerate(names):
        for record in rows[name]["records"]:
            parts = record["figures"].get("by_position") if record["status"] == "done" else None
            known = [((a + b) / 2, loss) for a, b, loss in parts or () if loss is not None]
            if known:
                axes.plot(
                    *zip(*known, strict=True),
                    **_style(number),
                    label=name.removeprefix("rope-"),
                )
    if not axes.lines:
        return None
    _scale(axes)
    axes.set_xlabel("position", fontsize=8)
    axes.set_ylabel("nats per token", fontsize=8)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _draw_healing(rows: Rows) -> Figure | None:
    """Held-out loss by tokens of healing, of the first seed of each row."""
    figure, axes = _make_figure(width=8.0, height=4.0)
    names = [name for name, row in rows.items() if row["section"] in ("heal", "objectives")]
    for number, name in enumerate(names):
        record = next((r for r in rows[name]["records"] if r["status"] == "done"), None)
        if record is None or not record["figures"].get("curve"):
            continue
        found = record["figures"]
        per_step = found["tokens"] / max(1, found["steps"])
        points = [(step * per_step, loss) for step, loss in found["curve"]]
        axes.plot(*zip(*points, strict=True), **_style(number), label=name)
    if not axes.lines:
        return None
    original = get_median(rows, ORIGINAL, "loss")
    if original is not None:
        axes.axhline(original, color="#333333", linewidth=0.8, linestyle=":", label=ORIGINAL)
    _scale(axes)
    axes.set_xlabel("tokens of healing", fontsize=8)
    axes.set_ylabel("held-out loss, nats per token", fontsize=8)
    figure.legend(loc="outside right upper", frameon=False, fontsize=7)
    return figure


_PICTURES: dict[str, Callable[[Rows], Figure | None]] = {
    "merge": _draw_merges,
    "pruning": _draw_pruning,
    "rope": _draw_positions,
    "healing": _draw_healing,
}
