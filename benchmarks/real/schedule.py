"""Rows in order, as many as the time allows; what is finished is not done again."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from benchmarks.real.perform import Runner, perform
from benchmarks.real.store import Records
from surgery.console import Steps, say, track_progress
from surgery.errors import ConfigError
from surgery.lab.report.quantities import format_duration

Task = tuple[str, int]  # row and seed

# On two slow cores that have nothing else to do: seconds until a process works, and tokens of a
# forward pass per second for a model of 135 M parameters. Finished rows correct it.
START_SECONDS = 25.0
TOKENS_PER_SECOND = 300.0


@dataclass
class Estimates:
    """Seconds that a row will take: as another seed of it did, or by its work.

    Attributes:
        speed: tokens of a forward pass per second.
    """

    records: Records
    speed: float = TOKENS_PER_SECOND

    def learn(self) -> None:
        """Take the speed from all that is finished."""
        work = spent = 0.0
        for name, row in self.records.rows.items():
            for path in sorted(self.records.folder.glob(f"{name}-*.json")):
                seed = path.stem.removeprefix(f"{name}-")
                found = self.records.read(name, int(seed)) if seed.isdigit() else None
                if found is not None and found["status"] == "done":
                    work += row.work
                    starts = START_SECONDS * len(row.commands)
                    spent += max(found["wall_seconds"] - starts, 0.1 * found["wall_seconds"])
        if work and spent:
            self.speed = work / spent

    def estimate(self, name: str, seed: int) -> float:
        row = self.records.rows[name]
        for other in range(seed + 1):
            found = self.records.read(name, other)
            if found is not None and found["status"] == "done":
                return float(found["wall_seconds"])
        return START_SECONDS * len(row.commands) + row.work / self.speed


@dataclass
class Outcome:
    """What a run came to.

    Attributes:
        failed: reasons, by row and seed; `blocked` are those that needed a row that failed.
        left: what is still to be done.
        out_of_time: whether the time did not suffice for the first of them.
    """

    done: list[Task] = field(default_factory=list)
    failed: dict[Task, str] = field(default_factory=dict)
    blocked: dict[Task, str] = field(default_factory=dict)
    left: list[Task] = field(default_factory=list)
    out_of_time: bool = False


def choose(records: Records, patterns: Sequence[str] | None, seeds: int) -> list[Task]:
    """Choose rows by name or pattern, with what they need before them.

    The first seed of all rows comes before the second of any.

    Raises:
        ConfigError: a pattern fits no row.
    """
    rows = records.rows
    wanted = match(rows, patterns)
    tasks: dict[Task, None] = {}

    def add(name: str, seed: int) -> None:
        for need in rows[name].needs:
            add(need, records.find_seed(need, seed))
        tasks.setdefault((name, seed))

    for seed in range(seeds):
        for name in wanted:
            if not seed or rows[name].seeded:
                add(name, seed)
    return list(tasks)


def match(names: Iterable[str], patterns: Sequence[str] | None) -> list[str]:
    """Match names against names or patterns; ``None`` matches all.

    Raises:
        ConfigError: a pattern fits no name.
    """
    known = list(names)
    for pattern in patterns or ():
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ConfigError(
                "--only", "there is no such row", given=pattern, valid=", ".join(known)
            )
    if patterns is None:
        return known
    return [name for name in known if any(fnmatchcase(name, pattern) for pattern in patterns)]


def find_todo(records: Records, tasks: Sequence[Task], redo: Iterable[Task] = ()) -> list[Task]:
    """Leave out what is done, unless what another row still needs of it is gone."""
    again = set(redo)
    todo: set[Task] = set()
    for task in reversed(tasks):
        name, seed = task
        kept_for = [
            (other, s)
            for other, s in todo
            if name in records.rows[other].needs and records.find_seed(name, s) == seed
        ]
        usable = records.has_kept(name, seed) or not kept_for
        if task in again or not records.is_done(name, seed) or not usable:
            todo.add(task)
    return [task for task in tasks if task in todo]


def go(
    records: Records,
    todo: Sequence[Task],
    runner: Runner,
    *,
    minutes: float = math.inf,
) -> Outcome:
    """Perform rows in order; a failed one is recorded, and the rest goes on.

    Args:
        minutes: no row starts that would not end within so many by its estimate, nor any after it.

    Raises:
        KeyboardInterrupt, SystemExit: it was stopped; finished rows are recorded.
    """
    outcome, start = Outcome(), time.monotonic()
    estimates = Estimates(records)
    with track_progress("rows on a real model", len(todo)) as steps:
        for number, task in enumerate(todo):
            estimates.learn()
            needed = estimates.estimate(*task)
            if time.monotonic() - start + needed > 60 * minutes:
                outcome.out_of_time = True
                outcome.left = list(todo[number:])
                break
            _do(records, task, runner, needed, outcome, steps)
            steps.advance()
    return outcome


def _do(
    records: Records,
    task: Task,
    runner: Runner,
    needed: float,
    outcome: Outcome,
    steps: Steps,
) -> None:
    name, seed = task
    row = records.rows[name]
    missing = [
        need for need in row.needs if not records.is_done(need, records.find_seed(need, seed))
    ]
    if missing:
        outcome.blocked[task] = f"needs {missing[0]}, which failed"
        say(f"{name}, seed {seed}: {outcome.blocked[task]}")
        return
    steps.describe(f"{name}, seed {seed} (about {format_duration(needed)})")
    say(f"{name}, seed {seed}: starts, about {format_duration(needed)}")
    need = records.find_need(name, seed)
    record = perform(row, seed, records.places, need, runner)
    records.write(record)
    if record["status"] == "done":
        outcome.done.append(task)
        loss = record["figures"].get("loss")
        figure = "" if loss is None else f", loss {loss:.4f}"
        say(f"{name}, seed {seed}: done in {format_duration(record['wall_seconds'])}{figure}")
    else:
        outcome.failed[task] = record["error"]
        say(f"{name}, seed {seed}: failed: {record['error']}")
