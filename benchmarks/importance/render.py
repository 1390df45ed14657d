"""The results file, the page and the pictures, all from the store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.importance.figures import derive
from benchmarks.importance.page import page
from benchmarks.importance.picture import draw_healing, draw_scopes
from benchmarks.importance.presets import Preset
from benchmarks.results_file import FOLDER
from benchmarks.shared.store import Store
from surgery.console import say
from surgery.files import write_text

ROOT = Path(__file__).parents[2]


class Targets(NamedTuple):
    """Where it all goes."""

    results: Path = FOLDER / "importance.json"
    page: Path = ROOT / "docs/benchmarks/importance.md"
    picture: Path = ROOT / "docs/images/importance.png"
    second_picture: Path = ROOT / "docs/images/importance_scopes.png"


def render(store: Store, preset: Preset, targets: Targets) -> None:
    """From the store; where there is none, from the results file that is kept."""
    if store.path.exists():
        kept: dict[str, Any] = {
            "runs": store.runs(),
            "preset": json.loads(json.dumps(preset.to_json())),
            "cells": list(store.cells().values()),
        }
    elif targets.results.exists():
        kept = json.loads(targets.results.read_text(encoding="utf-8"))
    else:
        raise SystemExit(f"neither {store.path} nor {targets.results}: measure first")
    if not kept["cells"]:
        raise SystemExit(f"no cell in {store.path}: measure first")
    what = "what importance estimators say of heads, and what pruning by them costs"
    figures = {"what": what, **kept, **derive(kept["cells"])}
    for path in targets:
        path.parent.mkdir(parents=True, exist_ok=True)
    write_text(targets.results, json.dumps(figures, indent=1, allow_nan=False) + "\n")
    draw_healing(figures, targets.picture)
    draw_scopes(figures, targets.second_picture)
    write_text(targets.page, page(figures, targets.page, targets.picture, targets.second_picture))
    say(f"written: {', '.join(map(str, targets))}")
