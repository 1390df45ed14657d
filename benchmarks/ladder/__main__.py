"""The paper ladder: baseline, + fast attention, + GQA, + fused projections.

`python -m benchmarks.ladder` measures on the CPU, `--preset gpu` on a GPU; `--render` draws the
picture and the page anew from the results that are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch

from benchmarks.ladder import timing
from benchmarks.ladder.models import (
    BASELINE,
    FUSED,
    PRESETS,
    PUBLISHED,
    Preset,
    backends,
    climb,
    differences,
    operations,
)
from benchmarks.ladder.render import render
from benchmarks.ladder.workloads import WORKLOADS, decode_bytes
from benchmarks.results_file import FOLDER
from surgery.console import Steps, say, track_progress
from surgery.lab.report.summary import describe_machine, find_versions

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # of the logits; in bf16 rounding is seen
_COMPARED_TOKENS = 512
_TRAIN_COST = 3  # of a forward pass


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if options.render:
        render(FOLDER)
        return
    warnings.filterwarnings("ignore")
    preset = PRESETS[options.preset]
    if options.malloc == "keep":
        timing.keep_pages()
    figures = run(
        preset,
        options.lengths or preset.lengths,
        options.workloads,
        options.rounds,
        60 * options.budget_minutes,
    )
    given = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["python", "-m", "benchmarks.ladder", *given])
    whole = {
        "command": command,
        "malloc": options.malloc,
        **figures,
        "machine": describe_machine(),
        "versions": find_versions(),
    }
    path = options.out or FOLDER / f"ladder-{_place(preset, options.malloc)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    say(f"kept in {path}")
    if options.out is None:
        render(FOLDER)


def run(
    preset: Preset, lengths: list[int], workloads: list[str], rounds: int, seconds: float
) -> dict[str, Any]:
    """All figures of one machine. Ends the program if a rung computes something else."""
    started = time.monotonic()
    lengths = sorted(lengths)
    say(f"planning and applying {len(operations(preset))} rungs")
    pages = timing.fresh_pages(preset.probe_bytes) if preset.device == "cpu" else None
    copied = timing.bandwidth(preset.device, preset.probe_bytes)
    models = climb(preset, max(lengths))
    tokens = torch.randint(
        preset.vocabulary,
        (preset.batch, max(lengths)),
        generator=torch.Generator().manual_seed(1),
    ).to(preset.device)
    errors = differences(models, tokens[:, : min(_COMPARED_TOKENS, max(lengths))])
    wrong = {pair: error for pair, error in errors.items() if error > TOLERANCE[preset.dtype]}
    if wrong:
        sys.exit(f"these should compute the same, and do not: {wrong}")

    results: dict[str, dict[str, Any]] = {workload: {} for workload in workloads}
    todo = [(length, workload) for length in lengths for workload in workloads]
    with track_progress("ladder", total=len(todo)) as steps:
        for number, (length, workload) in enumerate(todo):
            left = seconds - (time.monotonic() - started)
            share = _cost(*todo[number]) / sum(_cost(*cell) for cell in todo[number:])
            prompt = tokens[:, :length]
            builds = {
                name: partial(WORKLOADS[workload], model, prompt, preset.decode_tokens)
                for name, model in models.items()
            }
            for model in models.values():
                model.train(workload == "train")
            tick = partial(_tell, steps, f"{workload}, {length} tokens")
            cell = timing.measure(builds, preset.device, rounds, left * share, tick)
            shown = cell.to_json(BASELINE)
            if workload == "decode":
                for name, model in models.items():
                    _add_bound(shown[name], decode_bytes(model, preset.batch, length) / copied)
            results[workload][str(length)] = shown
            steps.advance()
            say(f"{workload}, {length} tokens: {_line(shown)}")
    return {
        "what": "speed-up of each rung over the baseline, ratios of the same round",
        "preset": preset.to_json(),
        "parameters": sum(p.numel() for p in models[BASELINE].parameters()),
        "rungs": operations(preset),
        "classes": {name: type(model).__name__ for name, model in models.items()},
        "backends": backends(models),
        "fused": _better(results),
        "units": {workload: WORKLOADS[workload].unit for workload in workloads},
        "published": PUBLISHED,
        "logits_differ": errors,
        "fresh_pages_bytes_per_s": pages,
        "copy_bytes_per_s": copied,
        "minutes": (time.monotonic() - started) / 60,
        "results": results,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ladder", description=__doc__)
    parser.add_argument("--preset", choices=list(PRESETS), default="cpu")
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument(
        "--budget-minutes",
        type=float,
        default=60.0,
        help=f"fewer rounds, though {timing.MIN_ROUNDS} at least, where it would take longer",
    )
    parser.add_argument(
        "--malloc",
        choices=["default", "keep"],
        default="default",
        help="keep: freed memory is reused, so that no time goes into fresh pages (glibc)",
    )
    parser.add_argument("--out", type=Path, help="where the JSON goes; nothing is drawn then")
    parser.add_argument("--render", action="store_true", help="draw only")
    return parser


def _cost(length: int, workload: str) -> float:
    """A guess, to divide the time left."""
    if workload == "decode":
        return 256.0 * length
    return length * (length + 1024) * (_TRAIN_COST if workload == "train" else 1)


def _tell(steps: Steps, cell: str, text: str) -> None:
    steps.describe(f"{cell}: {text}")


def _add_bound(rung: dict[str, Any], seconds: float) -> None:
    rung["bound_ms"] = 1e3 * seconds
    if "median" in rung:
        rung["share_of_bound"] = rung["bound_ms"] / rung["median"]


def _line(cell: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {rung['speedup']['median']:.2f}x"
        if "speedup" in rung
        else f"{name} {rung['median']:.4g} ms"
        if "median" in rung
        else f"{name} {rung['failed']}"
        for name, rung in cell.items()
    )


def _better(results: Mapping[str, Any]) -> str:
    """Of the two ways to fuse the one that is quicker on the whole, over all that was measured."""
    cells = [cell for cells in results.values() for cell in cells.values()]

    def on_the_whole(name: str) -> float:
        times = [cell[name]["median"] for cell in cells if "median" in cell[name]]
        return geometric_mean(times) if len(times) == len(cells) else math.inf

    return min(FUSED, key=on_the_whole)


def _place(preset: Preset, malloc: str) -> str:
    if preset.device == "cuda":
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")
    return preset.name if malloc == "default" else f"{preset.name}-{malloc}"


if __name__ == "__main__":
    main()
