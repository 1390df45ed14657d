"""Tables of several tasks for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from surgery.lab.report.quantities import NOTHING, format_signed

_TITLES = {
    "compare": "Held-out loss under each task's mask (nats/token)",
    "prune_each": "Held-out loss of each task's pruned model (nats/token)",
    "output_projections": "Held-out loss under each task's output projections (nats/token)",
    "one_mask": "Held-out loss of each task (nats/token)",
}


def format_warnings(found: Mapping[str, Any]) -> list[str]:
    """Format a line for every mask that costs another task more than `tasks.hurts`."""
    return [
        f"WARNING: the mask for {harm['mask']} costs {harm['task']} {harm['cost']:.3f} nats per "
        f"token, more than tasks.hurts={found['limit']:g}"
        for harm in found.get("hurts", [])
    ]


def make_losses_table(found: Mapping[str, Any]) -> Table:
    """Make a table with a row per task and a column per mask, model, projections or moment."""
    losses = found["losses"]
    table = Table(title=_TITLES[found["mode"]], title_justify="left")
    table.add_column("held-out text")
    for under in losses:
        table.add_column(under.replace("_", " "), justify="right")
    first, *others = losses.values()
    for task in found["names"]:
        costs = (f"{row[task]:.4f} ({format_signed(row[task] - first[task])})" for row in others)
        table.add_row(task, f"{first[task]:.4f}", *costs)
    return table


def make_agreement_table(found: Mapping[str, Any]) -> Table:
    """Make a table of rank correlations between tasks, and how many heads only each one needs."""
    table = Table(title=f"Rank correlation of {found['estimator']} scores", title_justify="left")
    table.add_column("task")
    for name in found["names"]:
        table.add_column(name, justify="right")
    if "only" in found:
        table.add_column("heads it alone needs", justify="right")
    for name, row in zip(found["names"], found["spearman"], strict=True):
        only = [str(len(found["only"][name]))] if "only" in found else []
        table.add_row(name, *(NOTHING if r is None else f"{r:.3f}" for r in row), *only)
    return table
