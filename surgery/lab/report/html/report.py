"""The report of one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from surgery.files import write_text
from surgery.lab.report.figures import ROWS
from surgery.lab.report.html import words
from surgery.lab.report.html.charts import collect_charts
from surgery.lab.report.html.data import RunFiles, read_run
from surgery.lab.report.html.page import render_page
from surgery.lab.report.html.tables import (
    convert_table,
    tabulate_calibration,
    tabulate_choices,
    tabulate_layers,
    tabulate_probes,
    tabulate_tasks,
    tabulate_times,
)
from surgery.lab.report.quantities import format_options
from surgery.lab.report.table import tabulate_result

REPORT = "report.html"
# What a page may weigh, in bytes; and what is first tried for the figures of heads.
LIMIT = 5_000_000
_ROOM = 2_400_000
# Operations named in the subtitle.
_NAMED = 3


def write_report(run_dir: Path) -> Path:
    """Make `report.html` of what lies in `run_dir`, without anything else.

    Returns:
        where it is.
    """
    path = run_dir / REPORT
    write_text(path, render_report(read_run(run_dir)))
    return path


def render_report(run: RunFiles, limit: int = LIMIT) -> str:
    """The page, at most `limit` bytes: figures of heads are thinned until it is."""
    room = min(_ROOM, limit // 2)
    while True:
        drawn, undrawn = collect_charts(run, room)
        text = render_page("report.html.j2", drawn, _collect_view(run, undrawn))
        if len(text.encode("utf-8")) <= limit or room == 0:
            return text
        room = room // 2 if room > 1000 else 0


def _collect_view(run: RunFiles, undrawn: list[str]) -> dict[str, Any]:
    named = [f"{spec['operation']}({format_options(spec)})" for spec in run.operations]
    what = [str(run.model.get("class") or ""), *named[:_NAMED]]
    what += [f"and {len(named) - _NAMED} more"] if len(named) > _NAMED else []
    return {
        "title": run.name,
        "heading": run.name,
        "subtitle": " · ".join(filter(None, what)),
        "run": run,
        "rows": ROWS,
        "headline": words.write_headline(run),
        "explanation": words.write_explanation(run),
        "remarks": words.collect_remarks(run, undrawn),
        "samples": run.part("samples"),
        "results": convert_table(tabulate_result(run.summary)) if run.measured else None,
        "layers": tabulate_layers(run.plan),
        "probes": tabulate_probes(run),
        "choices": list(tabulate_choices(run)),
        "calibration": list(tabulate_calibration(run)),
        "tasks": tabulate_tasks(run),
        "times": tabulate_times(run),
        "snippet": words.write_snippet(run),
    }
