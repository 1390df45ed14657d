"""A run's result as a few flat figures, under the same names in every run of a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery.lab.report.summary import MOMENTS

# W&B's name → key of a moment in summary.json; of the last moment that was measured.
_LAST = {
    "result/loss": "loss",
    "result/parameters": "parameters",
    "result/kv_bytes_per_token": "kv_bytes_per_token",
    "result/attention_flops": "attention_flops",
    "result/prefill_ms": "prefill_ms",
    "result/decode_ms": "decode_ms",
}
# The plan says these before anything is measured.
_PLANNED = ("parameters", "kv_bytes_per_token", "attention_flops")


def flatten_summary(summary: Mapping[str, Any]) -> dict[str, float | int | str]:
    """What a table of runs is sorted by. A figure that was not measured has no key.

    Args:
        summary: what `summary.json` holds.
    """
    found: dict[str, Any] = {
        f"result/loss_{moment}": summary[moment]["loss"]
        for moment in MOMENTS
        if summary.get(moment)
    }
    last: Mapping[str, Any] = next(
        (summary[moment] for moment in reversed(MOMENTS) if summary.get(moment)), {}
    )
    planned = summary["planned"]["after"]
    for name, key in _LAST.items():
        found[name] = last.get(key, planned.get(key) if key in _PLANNED else None)
    before = summary["planned"]["before"]
    if before.get("kv_bytes_per_token"):
        share = planned["kv_bytes_per_token"] / before["kv_bytes_per_token"]
        found["result/kv_bytes_share"] = share
    found["result/gap_closed"] = summary.get("gap_closed")
    training = summary.get("training") or {}
    found["result/steps"] = training.get("steps")
    found["result/tokens"] = training.get("tokens")
    if "alarms" in training:
        found["result/alarms"] = len(training["alarms"])
    names = [str(spec["operation"]) for spec in summary["operations"]]
    found["operations"] = ", ".join(names) or "none"
    found["export"] = (summary.get("export") or {}).get("format")
    return {name: value for name, value in found.items() if value is not None}
