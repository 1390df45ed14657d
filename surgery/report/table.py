"""The table a run ends with, from its summary alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.table import Table

from surgery.report.summary import MOMENTS
from surgery.units import in_bytes, in_count

_ROWS: list[tuple[str, str, Callable[[float], str]]] = [
    ("held-out loss (nats/token)", "loss", "{:.4f}".format),
    ("perplexity", "perplexity", "{:.3f}".format),
    ("parameters", "parameters", in_count),
    ("KV bytes per token", "kv_bytes_per_token", in_bytes),
    ("attention FLOPs per window", "attention_flops", in_count),
    ("prefill (ms)", "prefill_ms", "{:.2f}".format),
    ("decode (ms/token)", "decode_ms", "{:.2f}".format),
]


def result_table(summary: Mapping[str, Any]) -> Table:
    """Before / after surgery / after healing; moments that were not measured are left out."""
    names = {
        "before": "before",
        "after_surgery": "after surgery",
        "after_training": "after healing",
    }
    moments = [moment for moment in MOMENTS if summary.get(moment)]
    table = Table(title=f"Result for {summary['model']['name']}", title_justify="left")
    table.add_column("")
    for moment in moments:
        name = names[moment] if summary.get("operations") else moment.replace("_", " ")
        table.add_column(name, justify="right")
    for label, field, shown in _ROWS:
        values = [summary[moment].get(field) for moment in moments]
        table.add_row(label, *("-" if value is None else shown(value) for value in values))
    closed = summary.get("gap_closed")
    if closed is not None:
        steps = summary["training"]["steps"]
        table.caption = f"healing closed {closed:.0%} of the gap in {steps} steps"
    return table
