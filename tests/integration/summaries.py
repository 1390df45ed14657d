"""What a run says of itself at its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema


def read_summary(run: Path) -> dict[str, Any]:
    """Read `summary.json`, checked against the schema beside it."""
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    jsonschema.validate(summary, json.loads((run / "summary.schema.json").read_text()))
    return summary
