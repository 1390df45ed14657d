"""Leave-one-out with shared work against a whole pass per head: seconds, memory, equal results.

`python -m benchmarks.leave_one_out`. Every subject in a process of its own. The page is drawn from
the JSON that is kept; `--render` draws it anew.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from benchmarks.leave_one_out import measure
from benchmarks.leave_one_out.page import PAGE, page
from benchmarks.leave_one_out.subjects import MEASURED
from benchmarks.results_file import FOLDER, keep
from surgery.console import say

NAME = "leave_one_out"
# Times as fast as the plain loop, on the embedded model.
WANTED = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{NAME}", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="each times both ways once")
    parser.add_argument("--render", action="store_true", help="draw only")
    options = parser.parse_args()
    path = FOLDER / f"{NAME}.json"
    if not options.render:
        path = keep(NAME, run(MEASURED, options.rounds))
    PAGE.write_text(page(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")
    say(f"drawn: {PAGE}")


def run(names: Sequence[str], rounds: int) -> dict[str, Any]:
    """All figures."""
    subjects = []
    for name in names:
        found = fresh(measure.timed, name, rounds)
        found["memory"] = {way: fresh(measure.memory, name, way) for way in measure.WAYS}
        say(f"{name}: {found['speedup']:.2f} times as fast")
        subjects.append(found)
    return {
        "what": "leave-one-out scores of every query head of one batch, plain and with shared work",
        "wanted": WANTED,
        "subjects": subjects,
    }


def fresh(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What `function` returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


if __name__ == "__main__":
    main()
