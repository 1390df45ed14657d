"""Every headline of the project on a language model that people use.

`python -m benchmarks.real` runs the rows that are absent, the most informative first, and can be
cut off at any time; what is finished is kept and not done again. `--list` says what there is, what
would be run and how long it takes; `--page` writes the page and its pictures from the results file
alone.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.table import Table

from benchmarks.real.page import write_page
from benchmarks.real.perform import ROOT, Places, Runner, run_here, run_process
from benchmarks.real.picture import draw_all
from benchmarks.real.results import collect, hide_paths, name_results
from benchmarks.real.rows import is_healing, list_rows
from benchmarks.real.schedule import Estimates, Outcome, Task, choose, find_todo, go, match
from benchmarks.real.sizes import FULL, QUICK
from benchmarks.real.store import Records
from benchmarks.real.subject import DEFAULT, choose_name, find_subject
from surgery.console import say, show
from surgery.errors import ConfigError, SurgeryError
from surgery.files import write_json, write_text
from surgery.lab.report.quantities import format_duration
from surgery.signals import Stopped, raise_on_signals

# Options that only say where things lie.
_PLACES = ("--folder", "--results", "--docs", "--name")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, list or write; 1 if a row failed, 2 for a mistake, 128 + its number after a signal."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _make_parser()
    options = parser.parse_args(given)
    if options.seeds < 1 or not options.minutes > 0:
        parser.error("--seeds must be at least 1, and --minutes greater than 0")
    name = choose_name(options.model, options.name)
    home: Path = options.folder or ROOT / "outputs/real" / name / ("quick" if options.quick else "")
    # A try-out overwrites no result.
    results: Path = options.results or (
        home / "results.json" if options.quick else name_results(name)
    )
    sizes = QUICK if options.quick else FULL
    try:
        if options.page:
            write_docs(results, options.docs)
            return 0
        subject = find_subject(options.model, options.name)
        rows = {row.name: row for row in list_rows(subject, sizes)}
        records = Records(rows, home / "rows", Places(subject, (home / "runs").absolute()))
        tasks = choose(records, options.only, options.seeds)
        redone = match(rows, options.only) if options.redo else ()
        todo = find_todo(records, tasks, [task for task in tasks if task[0] in redone])
    except SurgeryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.list:
        _list(records, tasks, todo)
        return 0
    runner: Runner = (
        run_here if options.in_process else partial(run_process, threads=options.threads)
    )
    status = 0
    try:
        with raise_on_signals():
            status = _tell(go(records, todo, runner, minutes=options.minutes))
    except (Stopped, KeyboardInterrupt) as stop:
        status = stop.code if isinstance(stop, Stopped) else 128 + signal.SIGINT  # type: ignore[assignment]
        left = [task for task in todo if not records.is_done(*task)]
        say(f"stopped: {len(left)} of {len(todo)} rows are left; the same command goes on")
    results.parent.mkdir(parents=True, exist_ok=True)
    earlier = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else None
    write_json(results, collect(records, sizes, hide_paths(given, _PLACES), earlier))
    say(f"kept in {results}; python -m benchmarks.real --page writes the page")
    return status


def write_docs(results: Path, docs: Path) -> None:
    """Write the page and draw the pictures.

    Args:
        docs: the folder of `benchmarks/real.md` and of `images`.

    Raises:
        ConfigError: there are no such results.
    """
    if not results.is_file():
        raise ConfigError(
            "--results",
            "there is no such file",
            given=results,
            valid="what python -m benchmarks.real has written",
        )
    figures = json.loads(results.read_text(encoding="utf-8"))
    drawn = draw_all(figures, lambda name: docs / f"images/real_{name}.png")
    page = docs / "benchmarks/real.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    pictures = {name: f"../images/{path.name}" for name, path in drawn.items()}
    write_text(page, write_page(figures, results.name, pictures))
    say(f"written: {', '.join(map(str, (page, *drawn.values())))}")


def _tell(outcome: Outcome) -> int:
    """Say what a run came to, and return its status."""
    say(f"{len(outcome.done)} rows done, {len(outcome.failed)} failed, {len(outcome.left)} left")
    for tasks, what in ((outcome.failed, "failed"), (outcome.blocked, "not run")):
        for (name, seed), reason in tasks.items():
            say(f"  {name}, seed {seed}: {what}: {reason}")
    if outcome.left:
        names = ", ".join(f"{name} (seed {seed})" for name, seed in outcome.left)
        say(f"  the time does not suffice for: {names}")
    return 1 if outcome.failed or outcome.blocked else 0


def _list(records: Records, tasks: Sequence[Task], todo: Sequence[Task]) -> None:
    """Show every row, what has been done of it, and how long the rest takes."""
    estimates = Estimates(records)
    estimates.learn()
    table = Table("row", "what", "needs", "seeds", "done", "estimate of each")
    for name, row in records.rows.items():
        seeds = [seed for other, seed in tasks if other == name]
        if not seeds:
            continue
        done = sum((name, seed) not in todo for seed in seeds)
        each = format_duration(estimates.estimate(name, seeds[0]))
        needs = ", ".join(row.needs)
        table.add_row(name, row.what, needs, str(len(seeds)), str(done), each)
    show(table)
    total = sum(estimates.estimate(*task) for task in todo)
    healing = sum(estimates.estimate(*task) for task in todo if is_healing(records.rows[task[0]]))
    say(
        f"{len(todo)} rows to run, about {format_duration(total)}, of which healing takes "
        f"{format_duration(healing)}"
    )


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real", description=__doc__)
    add = parser.add_argument
    add("--model", help=f"for model.path; without it, model={DEFAULT}")
    add("--name", help="of the results file; without it, by the model")
    add("--only", nargs="+", metavar="ROW", help="names or patterns, with the rows they need")
    add("--list", action="store_true", help="say what there is and how long it takes")
    add("--seeds", type=int, default=3, help="where something is drawn")
    add("--minutes", type=float, default=math.inf, help="no row starts that would end later")
    add("--redo", action="store_true", help="run what is chosen, though it is there")
    add("--page", action="store_true", help="write the page and the pictures, and nothing else")
    add("--quick", action="store_true", help="little text, to see that all rows run")
    add("--threads", type=int, help="of each run")
    add("--in-process", action="store_true", help="no process of its own for each command")
    add("--folder", type=Path, help="of the runs and finished rows; outputs/real/NAME")
    add("--results", type=Path, help="the results file")
    add("--docs", type=Path, default=ROOT / "docs", help="where the page and the pictures go")
    return parser


if __name__ == "__main__":
    sys.exit(main())
