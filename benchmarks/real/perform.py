"""One row with one seed: its commands are run, and what came of it is a record."""

from __future__ import annotations

import datetime
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.real.read import read_costs, read_machine
from benchmarks.real.rows import Row
from benchmarks.real.subject import Subject
from surgery.errors import get_first_line
from surgery.lab.report.summary import describe_machine, find_versions
from surgery.models.source import find_embedded_dir

ROOT = Path(__file__).parents[2]
LOG = "log.txt"
_ENOUGH = 500  # characters of a failed command's message
Words = Sequence[str]
# Runs the words after `python`, writes all that they say to a file, and returns the status.
Runner = Callable[[Words, Path], int]


@dataclass(frozen=True)
class Places:
    """Folders of rows: RUNS/<row>-<seed>."""

    subject: Subject
    runs: Path

    def find(self, row: str, seed: int) -> Path:
        return self.runs / f"{row}-{seed}"

    def fill(self, words: Words, row: Row, seed: int, need: Path | None) -> list[str]:
        """Put what a run needs to know in the place of <...>."""
        values = {
            "<model>": self.subject.override,
            "<teacher>": self.subject.path,
            "<run>": str(self.find(row.name, seed)),
            "<need>": str(need),
            "<seed>": str(seed),
        }
        return [_replace(word, values) for word in words]

    def show(self, words: Words, row: Row, seed: int, need: Path | None) -> str:
        """Show a command as it can be typed, without the paths of this machine."""
        runs = f"outputs/real/{self.subject.name}/runs"
        values = {
            "<model>": self.subject.shown,
            "<teacher>": self.subject.shown_path,
            "<run>": f"{runs}/{row.name}-{seed}",
            "<need>": f"{runs}/{need.name}" if need is not None else "",
            "<seed>": str(seed),
        }
        return shlex.join(["python", *(_replace(word, values) for word in words)])

    def hide(self, text: str) -> str:
        """Take the paths of this machine out of a text."""
        known = {
            str(self.runs.absolute()): f"outputs/real/{self.subject.name}/runs",
            self.subject.path if os.sep in self.subject.path else "": self.subject.shown_path,
            str(find_embedded_dir()): "embedded",
            str(ROOT) + os.sep: "",
            sys.prefix + os.sep: "",
        }
        return _replace(text, {path: shown for path, shown in known.items() if path})


def perform(
    row: Row, seed: int, places: Places, need: Path | None, runner: Runner
) -> dict[str, Any]:
    """Run the commands and read the figures; a failure is a record, too.

    Args:
        need: folder of the row that this one starts from.

    Raises:
        KeyboardInterrupt, SystemExit: it was stopped; nothing is recorded.
    """
    folder = places.find(row.name, seed)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start, log = time.perf_counter(), folder / LOG
    record: dict[str, Any] = {
        "row": row.name,
        "seed": seed,
        "commands": [places.show(words, row, seed, need) for words in row.commands],
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    error = None
    for words in row.commands:
        status = runner(places.fill(words, row, seed, need), log)
        if status in (128 + 2, 128 + 15, -2, -15):  # by a signal: nobody's fault
            raise KeyboardInterrupt
        if status:
            killed = " (killed: out of memory?)" if status == -9 else ""
            error = f"status {status}{killed}: {places.hide(_find_reason(log))}"
            break
    if error is None:
        try:
            record["figures"] = row.read(folder)
        except (OSError, KeyError, TypeError, ValueError) as problem:
            error = f"its figures cannot be read: {type(problem).__name__}: {problem}"
            error = places.hide(get_first_line(problem) if not str(problem) else error)
    record["status"] = "done" if error is None else "failed"
    record["error"] = error
    record |= {"machine": describe_machine(), "versions": find_versions()} | read_machine(folder)
    record["costs"] = read_costs(folder)
    record["wall_seconds"] = round(time.perf_counter() - start, 1)
    if error is None:
        remove_weights(folder, row.keeps)
    return record


def remove_weights(folder: Path, kept: Sequence[str]) -> None:
    """Remove exports, checkpoints and best weights, but what other rows need."""
    for path in (*folder.glob("*/export"), *folder.glob("*/checkpoints")):
        if str(path.relative_to(folder)) not in kept:
            shutil.rmtree(path)
    for path in folder.glob("*/best.safetensors"):
        path.unlink()


def run_process(words: Words, log: Path, threads: int | None = None) -> int:
    """Run `python WORDS` from the project's folder."""
    env = dict(os.environ)
    if threads:
        env["OMP_NUM_THREADS"] = str(threads)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {shlex.join(['python', *words])}\n")
        file.flush()
        return subprocess.run(
            [sys.executable, *words],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
            env=env,
        ).returncode


def run_here(words: Words, log: Path) -> int:
    """Do the same without a new process: quicker, but peaks and failures are shared."""
    argv = list(sys.argv)
    with log.open("a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        print(f"$ {shlex.join(['python', *words])}")
        try:
            if words[0] == "-m":
                sys.argv = list(words[1:])
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                from surgery.cli import main  # Hydra takes seconds, and other runners need none

                sys.argv = list(words)
                main()
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except Exception as error:
            print(f"{type(error).__name__}: {error}")
            return 1
        finally:
            sys.argv = argv
    return 0


def _find_reason(log: Path) -> str:
    """Find the message of a failed command, or else the last line that it said."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line.strip() for line in lines if line.strip() and not line.startswith("$ ")]
    starts = [number for number, line in enumerate(said) if line.startswith("error:")]
    told = said[starts[-1] :][:3] if starts else said[-1:]
    return "; ".join(told)[:_ENOUGH] or "it said nothing"


def _replace(text: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        text = text.replace(name, value)
    return text
