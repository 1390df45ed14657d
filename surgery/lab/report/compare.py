"""The command that compares runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from surgery.errors import ConfigError, SurgeryError, refuse
from surgery.lab.report.summary import SUMMARY


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of `python -m surgery.lab.report`; a mistake is one message and exit status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m surgery.lab.report", description="Compare runs on one page."
    )
    parser.add_argument(
        "folders",
        metavar="RUN_DIR",
        nargs="+",
        type=Path,
        help="run directory, or a folder with run directories in it (a multirun)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("compare.html"), help="file to write (compare.html)"
    )
    given = parser.parse_args(arguments)
    try:
        print(compare_runs(given.folders, given.out))
    except SurgeryError as error:
        refuse(error)


def compare_runs(folders: Sequence[Path], out: Path) -> str:
    """Write the page; say what was compared.

    Raises:
        ConfigError: no runs there, a run of another format, or nowhere to write.
    """
    # Takes seconds, for matplotlib: what is wrong with the arguments is said before.
    from surgery.lab.report.html.comparison import write_comparison
    from surgery.lab.report.html.data import read_run

    if out.is_dir() or not out.parent.is_dir():
        problem = "is a directory" if out.is_dir() else "is in no directory that exists"
        raise ConfigError("--out", problem, given=out, valid="a file to write")
    runs = []
    for place in find_runs(folders):
        run = read_run(place)
        if not run.summary:
            raise ConfigError("RUN_DIR", run.problems[0], given=place)
        runs.append(run)
    try:
        write_comparison(runs, out)
    except OSError as error:
        raise ConfigError("--out", f"cannot be written: {error.strerror}", given=out) from None
    return f"{len(runs)} runs compared in {out}"


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """The folders that are runs, and the runs below those that are not; each once.

    Runs of a run's own (one per task) belong to it and are not looked for.

    Raises:
        ConfigError: a folder is not there, or holds no run.
    """
    found: dict[Path, None] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError("RUN_DIR", "is not a directory", given=folder)
        below = _find_runs_below(folder, SUMMARY)
        if not below:
            raise ConfigError(
                "RUN_DIR", f"holds no run: no {SUMMARY} is in it or below it", given=folder
            )
        found |= dict.fromkeys(place.resolve() for place in below)
    return list(found)


def _find_runs_below(folder: Path, name: str) -> list[Path]:
    if (folder / name).is_file():
        return [folder]
    inside = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.is_symlink()]
    return [
        run for entry in sorted(inside, key=_make_sort_key) for run in _find_runs_below(entry, name)
    ]


def _make_sort_key(path: Path) -> tuple[bool, int, str]:
    """Hydra numbers the runs of a sweep: 2 comes before 10."""
    return (not path.name.isdecimal(), int(path.name) if path.name.isdecimal() else 0, path.name)
