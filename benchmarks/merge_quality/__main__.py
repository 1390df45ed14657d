"""What each way to merge KV heads costs, and what healing brings back.

`python -m benchmarks.merge_quality` measures what its store lacks, best first, and can be cut off
at any time; `--render` draws the page and the picture anew from what is there.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.merge_quality import grid
from benchmarks.merge_quality.presets import FULL, QUICK, Preset
from benchmarks.merge_quality.render import ROOT, Targets, render
from benchmarks.merge_quality.schedule import go
from benchmarks.merge_quality.store import Store
from benchmarks.merge_quality.work import Work
from benchmarks.shared import models
from benchmarks.shared.options import add_common, run_of, targets
from surgery.console import say

OUTPUTS = ROOT / "outputs/merge_quality"


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options = parser.parse_args(given)
    preset = QUICK if options.quick else FULL
    unknown = set(options.kinds or ()) - set(preset.kinds)
    if unknown:
        parser.error(f"no such models in this grid: {', '.join(sorted(unknown))}")
    if any(rate <= 0 for rate in options.rates or ()):
        parser.error("--rates: a healing rate is greater than zero")
    home = OUTPUTS / "quick" if options.quick else OUTPUTS
    store = Store(options.store or home / "cells.jsonl")
    if not options.render:
        _measure(options, given, preset, store, options.models or home / "models")
    if options.models_only:
        return
    render(store, preset, targets(Targets, options, home))


def _measure(
    options: argparse.Namespace, given: list[str], preset: Preset, store: Store, folder: Path
) -> None:
    warnings.filterwarnings("ignore")
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of the workers
    torch.set_num_threads(options.threads)
    deadline = time.monotonic() + 60 * options.budget_minutes
    kinds = options.kinds or list(preset.kinds)
    seeds = options.seeds or preset.seeds
    _train_absent(preset, kinds, seeds, folder, options, deadline)
    if options.models_only:
        return
    ready = {
        (kind, seed)
        for kind in kinds
        for seed in seeds
        if models.there(preset.kinds[kind], seed, folder)
    }
    todo = [
        cell
        for cell in grid.cells(
            kinds,
            seeds,
            options.merges or preset.merges,
            options.ratios or preset.ratios,
            options.shares or preset.shares,
            options.objectives or preset.objectives,
            None if options.seeds else preset.healed_seeds,
        )
        + grid.rated(
            kinds,
            options.seeds or preset.healed_seeds,
            options.merges or grid.MAIN_MERGES,
            options.objectives or preset.objectives,
            options.rates or (),
        )
        if (cell.kind, cell.seed) in ready
    ]
    if not options.again:
        kept = store.cells()
        todo = [cell for cell in todo if cell.key not in kept]
    say(f"{len(todo)} cells to measure")
    if not todo:
        return
    store.append("run", run_of("benchmarks.merge_quality", given, options, Targets._fields))
    work = Work(preset.name, folder, store.path.parent / "plans", options.threads)
    refused = go(todo, store, work, workers=options.workers, deadline=deadline, again=options.again)
    left = sum(cell.key not in store.cells() for cell in todo)
    say(f"{len(todo) - left} cells measured, {left} left, {len(refused)} conversions refused")


def _train_absent(
    preset: Preset,
    kinds: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    options: argparse.Namespace,
    deadline: float,
) -> None:
    def one(kind: str, seed: int) -> None:
        if time.monotonic() < deadline:
            models.train(preset.kinds[kind], seed, preset, folder, options.threads)

    with ThreadPoolExecutor(options.workers) as pool:
        waiting = [
            pool.submit(one, kind, seed)
            for seed in seeds
            for kind in kinds
            if not models.there(preset.kinds[kind], seed, folder)
        ]
        for done in waiting:
            done.result()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merge_quality", description=__doc__)
    add_common(parser, [*FULL.kinds, *QUICK.kinds], Targets._fields)
    add = parser.add_argument
    add("--merges", nargs="+", choices=grid.MERGES)
    add("--ratios", nargs="+", choices=grid.RATIOS)
    add("--shares", nargs="+", type=float, choices=grid.SHARES, help="of the training tokens")
    add("--objectives", nargs="+", choices=grid.OBJECTIVES)
    add(
        "--rates",
        nargs="+",
        type=float,
        help="after the grid, what the targets are about at "
        "these healing rates, multiples of the project's default",
    )
    return parser


if __name__ == "__main__":
    main()
