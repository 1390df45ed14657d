"""Overrides that the commands of several benchmarks share."""

from __future__ import annotations

# Of a run whose figures alone count: nothing is watched, logged or saved on the way.
QUIET = (
    "logger=none",
    "callbacks.head_importance=null",
    "callbacks.attention_statistics=null",
    "callbacks.head_alarms=null",
    "callbacks.head_table=null",
    "callbacks.checkpoint=null",
)
