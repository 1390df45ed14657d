"""The command line: what ends it early ends it with one message and a status of its own."""

from __future__ import annotations

import sys

from surgery.console import is_rank_zero
from surgery.signals import Stopped, raise_on_signals


def main() -> None:
    """Entry of `train.py`, of `python -m surgery` and of the script `attention-surgery`.

    Raises:
        SystemExit: with status 2 for what the user can mend, with 128 + its number for a signal.
    """
    with raise_on_signals():
        try:
            # Takes a second, for Hydra; signals are handled by now.
            from surgery.command import run_command

            run_command()
        except Stopped as stop:
            if is_rank_zero():
                print(_format_stop(stop), file=sys.stderr)
            raise


def _format_stop(stop: Stopped) -> str:
    """Format in one line what stopped the run, what is kept, and how to go on."""
    where = f" in stage {stop.stage}" if stop.stage else " before the first stage"
    if stop.step is not None:
        where += f", after step {stop.step}"
    name = "Ctrl-C" if stop.signal.name == "SIGINT" else stop.signal.name
    if stop.run_dir is None or not stop.run_dir.is_dir():
        return f"stopped by {name}{where}: nothing was written; the same command starts again"
    text = f"stopped by {name}{where}: what is in {stop.run_dir} is whole"
    if stop.checkpoint is None:
        return f"{text}, but there is no checkpoint; the same command starts again"
    return f"{text}; the same command with resume={stop.checkpoint} goes on from there"
