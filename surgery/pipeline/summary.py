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
    noise = _compute_gap_noise(session)
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
        "gap_noise": noise,
        "gap_closed": compute_gap_closed(figures, noise),
        "samples": _describe_samples(session),
        "calibration": plan.calibration,
        "importance": None if scores is None else scores.describe(),
        "analysis": results.analysis or None,
        "comparison": results.comparison,
        "tasks": results.tasks or None,
        "training": results.training or None,
        "export": results.export or None,
        "timings": {name: round(seconds, 3) for name, seconds in results.timings.items()},
        "memory": {name: dict(peaks) for name, peaks in results.memory.items()},
        "machine": describe_machine(),
        "versions": find_versions(),
    }


def _describe_samples(session: Session) -> dict[str, Any] | None:
    samples = session.results.samples
    if not samples:
        return None
    texts = [{**dict.fromkeys(MOMENTS), **entry} for entry in samples.get("texts", [])]
    return {
        "new_tokens": session.run.report.new_tokens,
        "texts": texts,
        "problems": samples.get("problems", {}),
    }


def _compute_gap_noise(session: Session) -> float | None:
    """Compute the standard error of what surgery opened and training closed: the larger one."""
    measured = session.results.measurements
    if any(moment not in measured for moment in MOMENTS):
        return None
    before, opened, healed = (measured[moment].windows for moment in MOMENTS)
    errors = (opened.compute_error(before), opened.compute_error(healed))
    return max((error for error in errors if error is not None), default=None)
