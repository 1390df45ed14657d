"""The table a run ends with, from its summary alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from surgery.lab.report.figures import MOMENT_NAMES, ROWS
from surgery.lab.report.summary import MOMENTS


def result_table(summary: Mapping[str, Any]) -> Table:
    """Before / after surgery / after healing; moments that were not measured are left out."""
    moments = [moment for moment in MOMENTS if summary.get(moment)]
    table = Table(title=f"Result for {summary['model']['name']}", title_justify="left")
    table.add_column("")
    for moment in moments:
        name = MOMENT_NAMES[moment] if summary.get("operations") else moment.replace("_", " ")
        table.add_column(name, justify="right")
    for field, (label, shown) in ROWS.items():
        values = [summary[moment].get(field) for moment in moments]
        table.add_row(label, *("-" if value is None else shown(value) for value in values))
    closed = summary.get("gap_closed")
    if closed is not None:
        steps = summary["training"]["steps"]
        table.caption = f"healing closed {closed:.0%} of the gap in {steps} steps"
    return table
