"""What watching heads costs a training step: time in turn, memory in fresh processes.

`python -m benchmarks.observe`. The page and the picture are drawn from the JSON that is kept;
`--render` draws them anew. TransformerLens is looked for here, or by the Python that the
environment variable OBSERVE_LENS_PYTHON names.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.observe import measure
from benchmarks.observe.page import PAGE, page
from benchmarks.observe.picture import PICTURE, draw
from benchmarks.observe.subject import PRESETS, Preset
from benchmarks.observe.targets import judged
from benchmarks.observe.variants import ROWS, VARIANTS
from benchmarks.results_file import FOLDER, keep
from surgery.console import say, track_progress

NAME = "observe"
ROOT = Path(__file__).parents[2]
# Of the C library: tensors above so many bytes are given back as they are freed.
_EXACT = "MALLOC_MMAP_THRESHOLD_"
_LENS = ("plain", "TransformerLens")


def main() -> None:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{NAME}", description=__doc__)
    parser.add_argument("--rounds", type=int, help="of the longest; shorter ones have more")
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--memory", action="store_true", help="only this, beside times kept before")
    parser.add_argument("--quick", action="store_true", help="a tiny model; nothing is kept")
    parser.add_argument("--render", action="store_true", help="draw only")
    options = parser.parse_args()
    os.environ["WANDB_SILENT"] = "true"
    if options.quick:
        print(page(_named(run(PRESETS["quick"]))))
        return
    path = FOLDER / f"{NAME}.json"
    if options.memory:
        figures = memory_again(json.loads(path.read_text(encoding="utf-8")), PRESETS["cpu"])
        path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    elif not options.render:
        preset = PRESETS["cpu"]
        lengths = tuple(sorted(options.lengths or preset.lengths))
        preset = replace(preset, lengths=lengths, rounds=options.rounds or preset.rounds)
        path = keep(NAME, run(preset))
    figures = json.loads(path.read_text(encoding="utf-8"))
    figures["targets"] = judged(figures)
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    draw(figures, PICTURE)
    PAGE.write_text(page(figures), encoding="utf-8")
    say(f"drawn: {PAGE}, {PICTURE}")


def run(preset: Preset) -> dict[str, Any]:
    """All figures."""
    lens = Lens(preset)
    cells: dict[str, Any] = {}
    with track_progress("lengths", total=len(preset.lengths)) as steps:
        for length in preset.lengths:
            steps.describe(f"{length} tokens")
            cell: dict[str, Any] = {"time": fresh(measure.timed, preset, length)}
            cell["default"] = {"derived": measure.at_default(cell["time"])}
            if length in preset.block_lengths and preset.blocks:
                cell["default"] |= {"direct": fresh(measure.blocks, preset, length)}
            cell["memory"] = memories(preset, length)
            cell["lens"] = lens.cell(length)
            cells[str(length)] = cell
            steps.advance()
            _say(length, cell)
    figures = {
        "what": "a training step with heads watched, as a ratio to the same step unwatched",
        "preset": preset.to_json(),
        "rows": ROWS,
        "lens": {"version": lens.version, "absent": lens.absent},
        "lengths": cells,
    }
    return figures | {"targets": judged(figures)}


class Lens:
    """TransformerLens, wherever it is; the reason where it is not."""

    def __init__(self, preset: Preset) -> None:
        self.preset = preset
        self.version: str | None = None
        self.absent: str | None = None

    def cell(self, length: int) -> dict[str, Any] | None:
        """Times of both variants, and the memory of each."""
        times = self._ask(str(length))
        if times is None:
            return None
        memory = {name: self._ask(str(length), name) for name in _LENS}
        return {"time": measure.spread(times["wall"], times["cpu"]), "memory": memory}

    def _ask(self, *arguments: str) -> dict[str, Any] | None:
        if self.absent is not None:
            return None
        python = os.environ.get("OBSERVE_LENS_PYTHON", sys.executable)
        command = [python, "-m", "benchmarks.observe.lens", self.preset.name, *arguments]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, check=False
        )
        if done.returncode:
            self.absent = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
            say(f"TransformerLens: {self.absent}")
            return None
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        self.version = found.pop("version")
        return found


def memories(preset: Preset, length: int) -> dict[str, Any]:
    """What each variant takes, in processes whose memory is what their tensors take."""
    kept = os.environ.get(_EXACT)
    os.environ[_EXACT] = "65536"
    try:
        return {
            name: measure.middle(
                [fresh(measure.memory, preset, length, name) for _ in range(preset.memory_rounds)]
            )
            for name in VARIANTS
        }
    finally:
        os.environ.pop(_EXACT)
        if kept is not None:
            os.environ[_EXACT] = kept


def memory_again(figures: dict[str, Any], preset: Preset) -> dict[str, Any]:
    """Kept figures, with the memory of this project's variants measured anew."""
    with track_progress("lengths", total=len(figures["lengths"])) as steps:
        for length, cell in figures["lengths"].items():
            steps.describe(f"{length} tokens")
            cell["memory"] = memories(preset, int(length))
            steps.advance()
    figures["preset"]["memory_rounds"] = preset.memory_rounds
    figures["memory_command"] = f"python -m benchmarks.{NAME} --memory"
    return figures | {"targets": judged(figures)}


def fresh(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What `function` returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _named(figures: dict[str, Any]) -> dict[str, Any]:
    from surgery.lab.report.summary import describe_machine, find_versions

    command = f"python -m benchmarks.{NAME} --quick"
    return {
        "command": command,
        **figures,
        "machine": describe_machine(),
        "versions": find_versions(),
    }


def _say(length: int, cell: dict[str, Any]) -> None:
    ratios = ", ".join(f"{name} {one['ratio']:.3f}" for name, one in cell["time"].items())
    say(f"{length} tokens: {ratios}; at the default cadence {cell['default']['derived']:+.2%}")


if __name__ == "__main__":
    main()
