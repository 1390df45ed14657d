"""Where a benchmark's figures go: JSON, with the command and the machine named."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from surgery.lab.report.summary import describe_machine, find_versions

FOLDER = Path(__file__).parent / "results"


def keep(name: str, figures: dict[str, Any]) -> Path:
    """Write `results/<name>.json` and say so."""
    path = FOLDER / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    command = " ".join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]])
    whole = {
        "command": command,
        **figures,
        "machine": describe_machine(),
        "versions": find_versions(),
    }
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    print(f"kept in {path}")
    return path
