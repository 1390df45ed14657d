"""What a fresh machine needs: pins for every package, and a Makefile that says what is missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from .conftest import ROOT

PINS = [
    line
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SELF = canonicalize_name(PROJECT["name"])


def test_every_line_is_one_exact_public_version() -> None:
    for line in PINS:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line), line
    names = [canonicalize_name(line.split("==")[0]) for line in PINS]
    assert len(names) == len(set(names))
    assert not [name for name in names if name.startswith(("nvidia", "cuda", "triton"))]


def declared() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]
    return [r for r in map(Requirement, lines) if canonicalize_name(r.name) != SELF]


# Those that `make test-newest` and `make test-oldest` have in other versions.
COMPARED = [r for r in declared() if r.name in ("transformers", "datasets", "wandb")]


def pinned() -> dict[str, str]:
    pairs = (line.split("==") for line in PINS)
    return {canonicalize_name(name): version for name, version in pairs}


def test_pins_lie_in_the_ranges_of_the_package() -> None:
    for requirement in declared():
        version = pinned().get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is not pinned"
        assert requirement.specifier.contains(version), f"{requirement} excludes {version}"


def test_the_oldest_pins_are_the_lower_ends_of_the_ranges() -> None:
    """So that `make test-oldest` says whether the ranges are true."""
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    oldest = dict(line.split("==") for line in lines if not line.startswith("#"))
    for requirement in declared():
        lower = [s.version for s in requirement.specifier if s.operator in (">=", "==")]
        assert len(lower) == 1, f"{requirement} has no lower end"
        pin = oldest[canonicalize_name(requirement.name)]
        assert Version(pin) == Version(lower[0]), f"{requirement} is pinned to {pin}"


def test_what_the_dependencies_need_is_pinned_too() -> None:
    """Follows the installed packages' own requirements to the end."""
    if any(version(r.name) != pinned()[canonicalize_name(r.name)] for r in COMPARED):
        pytest.skip("not the pinned versions")
    todo = [(requirement, "") for requirement in declared()]
    seen: set[tuple[str, str]] = set()
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        if name.startswith(("nvidia", "cuda", "triton")):
            continue
        assert name in pinned(), f"{name} is needed and not pinned: run `make constraints`"
        for wanted in ("", *requirement.extras):
            if (name, wanted) in seen:
                continue
            seen.add((name, wanted))
            try:
                lines = requires(name) or []
            except PackageNotFoundError:
                pytest.fail(f"{name} is not installed: run the tests with `make test`")
            todo.extend((Requirement(line), wanted) for line in lines)


def make(*args: str, cwd: Path = ROOT, path: str | None = None) -> subprocess.CompletedProcess[str]:
    command = shutil.which("make")
    assert command is not None
    env = dict(os.environ) if path is None else {"PATH": path}
    # A make above this one (`make test`) hands its own flags and variables down.
    env = {k: v for k, v in env.items() if not k.startswith(("MAKE", "MFLAGS", "PYTHON"))}
    return subprocess.run(
        [command, *args],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_no_python_is_one_clear_message(tmp_path: Path) -> None:
    (tmp_path / "python3").write_text("#!/bin/sh\nexit 1\n")  # there, and too old
    (tmp_path / "python3").chmod(0o755)
    venv = tmp_path / "venv"
    done = make(f"VENV={venv}", f"{venv}/.installed", path=str(tmp_path))
    assert done.returncode != 0
    assert "error: no usable Python found" in done.stderr
    assert "Python 3.11 or newer" in done.stderr
    assert not venv.exists()


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("demo", "train.py +recipe=gqa_convert"),
        ("real-model", "train.py +recipe=gqa_convert model=smollm2"),
        ("test", "-m pytest"),
        ("lint", "-m ruff"),
        ("types", "-m mypy"),
        ("wheel", "-m build --wheel"),
    ],
)
def test_a_command_sets_up_and_runs(target: str, command: str, tmp_path: Path) -> None:
    """Dry run: the set-up comes first, and only in a tree that was not set up yet."""
    fresh = make("-n", target, f"VENV={tmp_path}/venv").stdout
    assert f"{tmp_path}/venv/bin/python {command}" in fresh
    assert fresh.index("--constraint constraints.txt") < fresh.index(command)
    (tmp_path / "venv").mkdir()
    for stamp in (".installed", ".installed-real", ".installed-dev"):
        (tmp_path / "venv" / stamp).touch()
    again = make("-n", target, f"VENV={tmp_path}/venv").stdout
    assert command in again
    assert "--constraint" not in again


@pytest.mark.parametrize(
    ("target", "venv", "versions"),
    [
        ("test-newest", "NEWEST", "--upgrade --upgrade-strategy eager"),
        ("test-oldest", "OLDEST", "--constraint constraints-oldest.txt"),
    ],
)
def test_both_ends_of_the_ranges(target: str, venv: str, versions: str, tmp_path: Path) -> None:
    said = make("-n", target, f"{venv}={tmp_path}/venv").stdout
    installs = [line for line in said.splitlines() if "--editable" in line]
    assert installs
    assert all(versions in line and "constraints.txt" not in line for line in installs)
    assert f"{tmp_path}/venv/bin/python -m pytest" in said


def test_workers_share_the_cores() -> None:
    assert "OMP_NUM_THREADS=1" in make("-n", "test", "WORKERS=2").stdout
    assert "OMP_NUM_THREADS" not in make("-n", "test", "WORKERS=0").stdout


def test_ci_runs_the_same_commands() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    assert [line for line in lines if line.startswith("make ")] == [
        "make test",
        "make lint",
        "make types",
    ]
