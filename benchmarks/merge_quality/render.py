"""The results file, the page and the picture, all from the store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.merge_quality.figures import derive
from benchmarks.merge_quality.page import page
from benchmarks.merge_quality.picture import draw
from benchmarks.merge_quality.presets import Preset
from benchmarks.merge_quality.store import Store
from benchmarks.results_file import FOLDER
from benchmarks.shared import results
from benchmarks.shared.results import ROOT


class Targets(NamedTuple):
    """Where it all goes."""

    results: Path = FOLDER / "merge_quality.json"
    page: Path = ROOT / "docs/benchmarks/merge_quality.md"
    picture: Path = ROOT / "docs/images/merge_quality.png"


def render(store: Store, preset: Preset, targets: Targets) -> None:
    """From the store; where there is none, from the results file that is kept."""

    def drawn(figures: Mapping[str, Any]) -> str:
        draw(figures, targets.picture)
        return page(figures, targets.page, targets.picture)

    what = "what merging KV heads costs and healing brings back; see docs/benchmarks"
    found = results.kept(store, preset.to_json(), targets.results)
    results.write({"what": what, **found, **derive(found["cells"])}, targets, drawn)
