"""The stage `report`: a table, a picture and `report.html`, from the run's files alone."""

from __future__ import annotations

import json
from pathlib import Path

from surgery.console import say, show
from surgery.errors import ConfigError
from surgery.lab.report.front import draw_front
from surgery.lab.report.html import write_report
from surgery.lab.report.picture import draw_result
from surgery.lab.report.summary import FORMAT, MOMENTS, SUMMARY
from surgery.lab.report.table import tabulate_result
from surgery.lab.tasks.table import format_warnings, make_agreement_table, make_losses_table
from surgery.pipeline.files import FRONT_PICTURE, RESULT_PICTURE


def report(run_dir: Path) -> None:
    """Print the table, draw the picture if anything was measured, and write `report.html`."""
    summary = json.loads((run_dir / SUMMARY).read_text(encoding="utf-8"))
    if any(summary.get(moment) for moment in MOMENTS):
        draw_result(summary, run_dir / RESULT_PICTURE)
        show(tabulate_result(summary))
    front = ((summary.get("calibration") or {}).get("chosen") or {}).get("front")
    if front:
        draw_front(front, run_dir / FRONT_PICTURE)
    if summary.get("tasks"):
        if summary["tasks"].get("spearman"):
            show(make_agreement_table(summary["tasks"]))
        if summary["tasks"]["losses"]:
            show(make_losses_table(summary["tasks"]))
        for warning in format_warnings(summary["tasks"]):
            say(warning)
    path = write_report(run_dir)
    say(f"  {path}: {path.stat().st_size / 1e6:.2f} MB")
    say(f"everything is in {run_dir}")


def report_again(run_dir: Path) -> None:
    """Report on an earlier run: `stages=[report]`.

    Raises:
        ConfigError: the directory has no run that this version can read.
    """
    path = run_dir / SUMMARY
    if not path.is_file():
        raise ConfigError(
            "hydra.run.dir",
            f"holds no {SUMMARY} to report on",
            given=str(run_dir),
            valid="the directory of an earlier run",
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("format")
    except (ValueError, AttributeError):
        found = "unreadable"
    if found != FORMAT:
        raise ConfigError(
            "hydra.run.dir", f"its {SUMMARY} has another format", given=found, valid=[FORMAT]
        )
    report(run_dir)
