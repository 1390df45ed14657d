"""A grid's results file: what its store holds, with what follows from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.shared.store import Store
from surgery.console import say
from surgery.files import write_text

ROOT = Path(__file__).parents[2]


def kept(store: Store, preset: Mapping[str, Any], results: Path) -> dict[str, Any]:
    """{"runs", "preset", "cells"} of the store; where there is none, those of the results file.

    Raises:
        SystemExit: nothing was measured.
    """
    if store.path.exists():
        found: dict[str, Any] = {
            "runs": store.runs(),
            "preset": json.loads(json.dumps(preset)),
            "cells": list(store.cells().values()),
        }
    elif results.exists():
        found = json.loads(results.read_text(encoding="utf-8"))
    else:
        raise SystemExit(f"neither {store.path} nor {results}: measure first")
    if not found["cells"]:
        raise SystemExit(f"no cell in {store.path}: measure first")
    return found


def write(
    figures: Mapping[str, Any], targets: Iterable[Path], render: Callable[[Mapping[str, Any]], str]
) -> None:
    """The results file, then the page beside it.

    Args:
        targets: of the results file, the page, then the pictures.
        render: draws the pictures, and returns the page.
    """
    places = list(targets)
    for path in places:
        path.parent.mkdir(parents=True, exist_ok=True)
    write_text(places[0], json.dumps(figures, indent=1, allow_nan=False) + "\n")
    write_text(places[1], render(figures))
    say(f"written: {', '.join(map(str, places))}")
