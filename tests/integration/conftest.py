"""Running the command line: inside the test process for speed, or as a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pytest

from surgery.cli import main

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """`python train.py *overrides`, without the new process. Nothing is mocked."""

    def run(*overrides: str) -> Outcome:
        out, err, code = StringIO(), StringIO(), 0
        monkeypatch.setattr(sys, "argv", ["train.py", *overrides])
        try:
            with redirect_stdout(out), redirect_stderr(err):
                main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Outcome(code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def process() -> Callable[..., Outcome]:
    """`python train.py *overrides`, for real, from another directory."""

    def run(*overrides: str, cwd: Path, **env: str) -> Outcome:
        import os

        done = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *overrides],
            cwd=cwd,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run
