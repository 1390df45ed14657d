"""The closed-form merge of one attention layer, from its statistics: seconds and memory.

`python -m benchmarks.merge_layer`. One child process collects the statistics of a random layer and
writes them to a file, a fresh one loads them and merges, and another averages the same layer's keys
and values for comparison. The page is drawn from the JSON that is kept; `--render` draws it anew.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.merge_layer import merge
from benchmarks.merge_layer.collect import collect
from benchmarks.merge_layer.layer import DECAY, NEIGHBOURS, PRESETS, Preset
from benchmarks.merge_layer.page import PAGE, page
from benchmarks.results_file import FOLDER, keep
from surgery.console import say

LIMITS = {"seconds": 60.0, "peak_bytes": 3e9}
NAME = "merge_layer"


def main() -> None:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{NAME}", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes that merge")
    parser.add_argument("--render", action="store_true", help="draw only")
    options = parser.parse_args()
    path = FOLDER / f"{NAME}.json"
    if not options.render:
        path = keep(NAME, run(PRESETS["llama-2-7b"], options.repeats))
    PAGE.write_text(page(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")
    say(f"drawn: {PAGE}")


def run(preset: Preset, repeats: int) -> dict[str, Any]:
    """All figures. Of the merges the one of median seconds; memory is the most that any took."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "statistics.pt"
        say(f"collecting the statistics of {preset.measured} windows")
        collected = fresh(collect, preset, path)
        on_disk = path.stat().st_size
        merges = []
        for number in range(repeats):
            merges.append(fresh(merge.optimal, path, preset.kv_heads))
            say(f"merge {number + 1} of {repeats}: {merges[-1]['seconds']:.1f} s")
        pooled = fresh(merge.mean_pool, path, preset.kv_heads)
    merges.sort(key=lambda one: one["seconds"])
    optimal = merges[len(merges) // 2]
    optimal["rounds_s"] = [one["seconds"] for one in merges]
    optimal["peak_bytes"] = max(one["peak_bytes"] for one in merges)
    # One [D, D] covariance of attended inputs per query head, in fp64.
    naive = preset.heads * preset.hidden**2 * 8
    kept = collected["kept_bytes"]
    return {
        "what": "one layer's KV heads merged by similarity and merge=optimal, given its statistics",
        "preset": preset.to_json(),
        "data": f"random weights; inputs of features whose variance falls as i^-{DECAY:g}, "
        f"neighbours correlated by {NEIGHBOURS:g}. The statistics are those of {preset.measured} "
        f"windows instead of {preset.windows}, with {preset.measured * preset.measured_rows} query "
        "rows as all would have: their sizes depend on the layer's widths alone, and so does the "
        "cost of the solve, but for how soon the values' iterations settle (at most 10 rounds of "
        "40 steps per group).",
        "limits": LIMITS,
        "within_limits": optimal["seconds"] <= LIMITS["seconds"]
        and optimal["peak_bytes"] <= LIMITS["peak_bytes"],
        "merge": optimal,
        "collecting": collected,
        "file_bytes": on_disk,
        "alternatives": {
            "mean": {
                **pooled,
                "seconds_ratio": optimal["seconds"] / pooled["seconds"],
                "peak_ratio": optimal["peak_bytes"] / pooled["peak_bytes"],
            },
            "hidden x hidden per head": {"kept_bytes": naive, "kept_ratio": naive / kept},
        },
    }


def fresh(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What `function` returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


if __name__ == "__main__":
    main()
