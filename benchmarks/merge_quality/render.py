"""The results file, the page and the picture, all from the store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.merge_quality.figures import derive
from benchmarks.merge_quality.page import page
from benchmarks.merge_quality.picture import draw
from benchmarks.merge_quality.presets import Preset
from benchmarks.merge_quality.store import Store
from benchmarks.results_file import FOLDER
from surgery.console import say
from surgery.files import write_text

ROOT = Path(__file__).parents[2]


class Targets(NamedTuple):
    """Where it all goes."""

    results: Path = FOLDER / "merge_quality.json"
    page: Path = ROOT / "docs/benchmarks/merge_quality.md"
    picture: Path = ROOT / "docs/images/merge_quality.png"


def render(store: Store, preset: Preset, targets: Targets) -> None:
    """From the store; where there is none, from the results file that is kept."""
    if store.path.exists():
        kept: dict[str, Any] = {
            "runs": store.runs(),
            "preset": preset.to_json(),
            "cells": list(store.cells().values()),
        }
    elif targets.results.exists():
        kept = json.loads(targets.results.read_text(encoding="utf-8"))
    else:
        raise SystemExit(f"neither {store.path} nor {targets.results}: measure first")
    if not kept["cells"]:
        raise SystemExit(f"no cell in {store.path}: measure first")
    what = "what merging KV heads costs and healing brings back; see docs/benchmarks"
    figures = {"what": what, **kept, **derive(kept["cells"])}
    for path in targets:
        path.parent.mkdir(parents=True, exist_ok=True)
    write_text(targets.results, json.dumps(figures, indent=1, allow_nan=False) + "\n")
    draw(figures, targets.picture)
    write_text(targets.page, page(figures, targets.page, targets.picture))
    say(f"written: {', '.join(map(str, targets))}")
