"""Pruned models against their alternatives at equal tokens, and what they save on the clock.

`python -m benchmarks.pruning` performs the runs that its folder lacks, times the recipe's export
against the original, and writes the page; it can be cut off at any time. `--clock-only` times
anew, `--render` draws alone.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import surgery  # noqa: F401  (records)
from benchmarks.pruning.clock import paired
from benchmarks.pruning.page import PAGE, page
from benchmarks.pruning.runs import ROOT, RUNS, TRAINED_TOKENS, perform
from benchmarks.results_file import FOLDER, keep
from surgery.console import say
from surgery.models.source import find_embedded_dir

NAME = "pruning"
TIMED = ("recipe", "per layer", "distil")
FIELDS = ("loss", "parameters", "kv_bytes_per_token", "attention_flops")


def main() -> None:
    options = _parser().parse_args()
    path = FOLDER / f"{NAME}.json"
    if not options.render:
        figures = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if not options.clock_only:
            figures["runs"] = _runs(options)
            figures["steps"], figures["share"] = options.steps, _share(options.steps)
        if not options.runs_only:
            figures["clock"] = _clock(options)
        kept = ("runs", "steps", "share", "clock")
        path = keep(NAME, {name: figures[name] for name in kept if name in figures})
    PAGE.write_text(page(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")
    say(f"drawn: {PAGE}")


def _share(steps: int) -> float:
    return steps * 8 * 512 / TRAINED_TOKENS


def _runs(options: argparse.Namespace) -> list[dict[str, Any]]:
    deadline = time.monotonic() + 60 * options.budget_minutes
    found = []
    for seed in options.seeds:
        for run in RUNS:
            if options.only and run.name not in options.only:
                continue
            folder = _folder(options, run.name, seed)
            if time.monotonic() > deadline and not (folder / "summary.json").is_file():
                continue
            summary = perform(run, options.steps, seed, options.threads, folder)
            found.append(
                {
                    "name": run.name,
                    "group": run.group,
                    "what": run.what,
                    "seed": seed,
                    "overrides": list(run.overrides),
                    **_figures(summary),
                }
            )
            say(f"{run.name}, seed {seed}: {found[-1]['after']['loss']:.4f}")
    return found


def _figures(summary: dict[str, Any]) -> dict[str, Any]:
    opened = summary["after_surgery"]
    return {
        "before": {field: summary["before"][field] for field in FIELDS},
        "opened": None if opened is None else opened["loss"],
        "after": {field: summary["after_training"][field] for field in FIELDS},
        "planned": summary["planned"]["after"],
        "tokens": summary["training"]["tokens"],
        "format": summary["export"]["format"],
        "seconds": summary["timings"]["total"],
    }


@torch.inference_mode()
def _clock(options: argparse.Namespace) -> list[dict[str, Any]]:
    torch.set_num_threads(options.threads)
    original = AutoModelForCausalLM.from_pretrained(find_embedded_dir(), dtype=torch.float32).eval()
    found = []
    for name in TIMED:
        folder = _folder(options, name, options.seeds[0]) / "export"
        if not folder.is_dir():
            continue
        pruned = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for batch in (1, 16):
            timed = paired({"original": original, name: pruned}, batch, 512, options.rounds)
            found.append({"name": name, "threads": options.threads, **timed})
    return found


def _folder(options: argparse.Namespace, name: str, seed: int) -> Path:
    words = name.replace(",", "").replace(" ", "-")
    folder: Path = options.folder / f"{words}-{options.steps}-{seed}"
    return folder


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{NAME}", description=__doc__)
    add = parser.add_argument
    add("--steps", type=int, default=260, help="of 8 x 512 tokens; 260 are a tenth of the model's")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--only", nargs="+", choices=[run.name for run in RUNS])
    add("--threads", type=int, default=torch.get_num_threads())
    add("--rounds", type=int, default=15, help="of the clock")
    add("--budget-minutes", type=float, default=float("inf"), help="no run begins after so long")
    add("--folder", type=Path, default=ROOT / "outputs/pruning", help="of the runs")
    add("--runs-only", action="store_true", help="no clock")
    add("--clock-only", action="store_true", help="no runs")
    add("--render", action="store_true", help="draw only")
    return parser


if __name__ == "__main__":
    main()
