"""How well each importance estimator says what is lost when heads are pruned.

`python -m benchmarks.importance` measures what its store lacks, best first, and can be cut off at
any time; `--render` draws the page and the pictures anew from what is there.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.importance import grid
from benchmarks.importance.presets import FULL, QUICK, Preset
from benchmarks.importance.render import ROOT, Targets, render
from benchmarks.importance.work import WEIGHTS_SEED, Work
from benchmarks.shared import models
from benchmarks.shared.options import add_common, run_of, targets
from benchmarks.shared.schedule import go
from benchmarks.shared.store import Store
from surgery.console import say

OUTPUTS = ROOT / "outputs/importance"


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options = parser.parse_args(given)
    preset = QUICK if options.quick else FULL
    unknown = set(options.kinds or ()) - set(preset.kinds)
    if unknown:
        parser.error(f"no such models in this grid: {', '.join(sorted(unknown))}")
    home = OUTPUTS / "quick" if options.quick else OUTPUTS
    store = Store(options.store or home / "cells.jsonl", lambda record: grid.Cell.of(record).key)
    if not options.render:
        _measure(options, given, preset, store, options.models or home / "models")
    if not options.models_only:
        render(store, preset, targets(Targets, options, home))


def _measure(
    options: argparse.Namespace, given: list[str], preset: Preset, store: Store, folder: Path
) -> None:
    warnings.filterwarnings("ignore")
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of the workers
    torch.set_num_threads(options.threads)
    deadline = time.monotonic() + 60 * options.budget_minutes
    kinds = options.kinds or list(preset.kinds)
    ready = [kind for kind in kinds if _there(kind, preset, folder, options, deadline)]
    if options.models_only:
        return
    todo = grid.cells(
        {kind: preset.units[kind] for kind in ready},
        options.estimators or preset.estimators,
        options.seeds or preset.seeds,
        options.scopes or preset.scopes,
        options.amounts or preset.amounts,
        healed=not options.no_healing,
    )
    if not options.again:
        kept = store.cells()
        todo = [cell for cell in todo if cell.key not in kept]
    say(f"{len(todo)} cells to measure")
    if not todo:
        return
    store.append("run", run_of("benchmarks.importance", given, options, Targets._fields))
    work = Work(preset.name, folder, store.path.parent / "scores", options.threads)
    refused = go(
        todo,
        store,
        work,
        change=_change,
        said=_said,
        workers=options.workers,
        deadline=deadline,
        again=options.again,
    )
    left = sum(cell.key not in store.cells() for cell in todo)
    say(f"{len(todo) - left} cells measured, {left} left, {len(refused)} changes refused")


def _there(
    kind: str, preset: Preset, folder: Path, options: argparse.Namespace, deadline: float
) -> bool:
    """Whether a model can be measured, trained here if need be."""
    spec = preset.kinds[kind]
    if models.there(spec, WEIGHTS_SEED, folder):
        return True
    if spec.package:
        say(f"{kind}: left out, since the package {spec.package} is not installed")
        return False
    if time.monotonic() < deadline:
        models.train(spec, WEIGHTS_SEED, preset, folder, options.threads)
    return models.there(spec, WEIGHTS_SEED, folder)


def _change(cell: grid.Cell) -> str:
    return f"{cell.kind} {cell.unit} {cell.what} {cell.estimator} {cell.scope} {cell.amount:.0%}"


def _said(record: dict[str, Any]) -> str:
    if "loss" in record:
        return f"{record['removed']} heads less, loss {record['loss']:.4f}"
    return f"{record['seconds']['score'] / record['forward_seconds']:.1f} forward passes"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.importance", description=__doc__)
    add_common(parser, [*FULL.kinds, *QUICK.kinds], Targets._fields)
    add = parser.add_argument
    add("--estimators", nargs="+", choices=grid.ESTIMATORS)
    add("--scopes", nargs="+", choices=grid.SCOPES)
    add("--amounts", nargs="+", type=float, help="share of the heads")
    add("--no-healing", action="store_true", help="only what needs no training")
    return parser


if __name__ == "__main__":
    main()
