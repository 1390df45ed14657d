"""A session, boiled down to what `summary.json` says of it."""

from __future__ import annotations

from typing import Any

from surgery.lab.report.summary import FORMAT, MOMENTS, gap_closed, machine, versions
from surgery.pipeline.session import Session


def summarize(session: Session) -> dict[str, Any]:
    """Everything a script may want to know of a run, as plain JSON."""
    figures = {
        moment: session.measurements[moment].to_json() if moment in session.measurements else None
        for moment in MOMENTS
    }
    return {
        "format": FORMAT,
        "stages": [stage.value for stage in session.run.stages],
        "seed": session.run.seed,
        "model": dict(session.plan.model),
        "operations": [dict(spec) for spec in session.whole_plan.operations],
        "planned": {
            "before": session.whole_plan.sizes_before.to_json(),
            "after": session.whole_plan.sizes_after.to_json(),
        },
        **figures,
        "gap_closed": gap_closed(figures),
        "calibration": session.plan.calibration,
        "importance": None if session.scores is None else session.scores.describe(),
        "analysis": session.analysis or None,
        "comparison": session.comparison,
        "tasks": session.tasks or None,
        "training": session.training or None,
        "export": session.export or None,
        "timings": {name: round(seconds, 3) for name, seconds in session.timings.items()},
        "machine": machine(),
        "versions": versions(),
    }
