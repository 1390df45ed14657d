"""The results file, the page and the pictures, all from the store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.importance.figures import derive
from benchmarks.importance.page import page
from benchmarks.importance.picture import draw_healing, draw_scopes
from benchmarks.importance.presets import Preset
from benchmarks.results_file import FOLDER
from benchmarks.shared import results
from benchmarks.shared.results import ROOT
from benchmarks.shared.store import Store


class Targets(NamedTuple):
    """Where it all goes."""

    results: Path = FOLDER / "importance.json"
    page: Path = ROOT / "docs/benchmarks/importance.md"
    picture: Path = ROOT / "docs/images/importance.png"
    second_picture: Path = ROOT / "docs/images/importance_scopes.png"


def render(store: Store, preset: Preset, targets: Targets) -> None:
    """From the store; where there is none, from the results file that is kept."""

    def drawn(figures: Mapping[str, Any]) -> str:
        draw_healing(figures, targets.picture)
        draw_scopes(figures, targets.second_picture)
        return page(figures, targets.page, targets.picture, targets.second_picture)

    what = "what importance estimators say of heads, and what pruning by them costs"
    found = results.kept(store, preset.to_json(), targets.results)
    results.write({"what": what, **found, **derive(found["cells"])}, targets, drawn)
