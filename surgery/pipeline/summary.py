"""Summarize a session for `summary.json`."""

from __future__ import annotations

from typing import Any

from surgery.lab.report.summary import (
    FORMAT,
    MOMENTS,
    compute_gap_closed,
    describe_machine,
    find_versions,
)
from surgery.pipeline.files import IMPORTANCE
from surgery.pipeline.session import Session


def summarize(session: Session) -> dict[str, Any]:
    """Collect what a script may need to know about a run, as plain JSON."""
    plan, whole, results = session.plan, session.whole_plan, session.results
    figures = {
        moment: results.measurements[moment].to_json() if moment in results.measurements else None
        for moment in MOMENTS
    }
    scores = results.scores.get(IMPORTANCE)
    return {
        "format": FORMAT,
        "stages": [stage.value for stage in session.run.stages],
        "seed": session.run.seed,
        "model": dict(plan.model),
        "operations": [dict(spec) for spec in whole.operations],
        "planned": {
            "tokens": whole.tokens,
            "before": whole.sizes_before.to_json(),
            "after": whole.sizes_after.to_json(),
        },
        **figures,
        "gap_closed": compute_gap_closed(figures),
        "calibration": plan.calibration,
        "importance": None if scores is None else scores.describe(),
        "analysis": results.analysis or None,
        "comparison": results.comparison,
        "tasks": results.tasks or None,
        "training": results.training or None,
        "export": results.export or None,
        "timings": {name: round(seconds, 3) for name, seconds in results.timings.items()},
        "machine": describe_machine(),
        "versions": find_versions(),
    }
