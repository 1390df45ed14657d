"""A wheel built from this checkout, and the same wheel installed apart from it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from surgery.plan.operation import Operation
from surgery.plan.registry import find_operations

ROOT = Path(__file__).parents[2]
# Everything a build reads; the caches, runs and environments beside it stay where they are.
BUILD_INPUTS = (
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "surgery",
    "callbacks",
    "conf",
    "recipes",
)


def find_own_operations() -> dict[str, type[Operation]]:
    """Find the operations of this project: other tests, run in the same process, have theirs."""
    found = find_operations().items()
    return {name: kind for name, kind in found if kind.__module__.startswith("surgery.")}


def run(*command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """`command` in `cwd` without the settings of the surrounding shell that could leak in."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "HYDRA", "PIP_"))}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=kept | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("tree")
    for name in BUILD_INPUTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.is_file():
            shutil.copy(source, tree / name)
    built = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", cwd=tree)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (tree / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel and nothing else."""
    target = tmp_path_factory.mktemp("site")
    done = run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-index",
        "--no-deps",
        "--no-compile",
        "--target",
        target,
        wheel,
        cwd=target,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return target


Runner = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def python(installed: Path, tmp_path: Path) -> Runner:
    """Runs Python in an empty folder, with the installed wheel and its dependencies.

    -S leaves out the .pth files of this environment: an editable install of this checkout would
    supply whatever the wheel forgot.
    """
    dependencies = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}

    def call(*args: str | Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
        entries = [*([path] if path else []), installed, *sorted(dependencies)]
        search = os.pathsep.join(map(str, entries))
        return run(sys.executable, "-S", *args, cwd=path or tmp_path, PYTHONPATH=search)

    return call
