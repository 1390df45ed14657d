"""The table a run ends with, from its summary alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from surgery.lab.report.figures import MOMENT_NAMES, ROWS, name_figure
from surgery.lab.report.healing import describe_gap, describe_healing, describe_rate
from surgery.lab.report.quantities import NOTHING, format_change
from surgery.lab.report.summary import MOMENTS


def tabulate_result(summary: Mapping[str, Any]) -> Table:
    """Before / after surgery / after healing; what was not measured is left out."""
    moments = [moment for moment in MOMENTS if summary.get(moment)]
    table = Table(title=f"Result for {summary['model']['name']}", title_justify="left")
    table.add_column("")
    for moment in moments:
        name = MOMENT_NAMES[moment] if summary.get("operations") else moment.replace("_", " ")
        table.add_column(name, justify="right")
    if len(moments) > 1:
        table.add_column("change", justify="right")
    for field, (_, show) in ROWS.items():
        values = [summary[moment].get(field) for moment in moments]
        if any(value is not None for value in values):
            shown = [NOTHING if value is None else show(value) for value in values]
            change = [format_change(values[0], values[-1])] if len(moments) > 1 else []
            table.add_row(name_figure(field, summary), *shown, *change)
    gap, training = describe_gap(summary), summary.get("training") or {}
    lines = [] if gap is None else [gap]
    if training.get("rate"):  # summaries of earlier versions have none
        lines.append(describe_rate(training["lr"], **training["rate"]))
    lines += describe_healing(training, exported=bool(summary.get("export")))
    table.caption = "\n".join(lines) or None
    table.caption_justify = "left"
    return table
