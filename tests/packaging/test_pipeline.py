"""The pipeline in one direction: no circle, nothing imported late without need, no operation named.

Imports count wherever they stand: at the top, in a function, under `if TYPE_CHECKING`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from .conftest import ROOT, find_own_operations

PIPELINE = ROOT / "surgery" / "pipeline"
FILES = sorted(PIPELINE.glob("*.py"))
# Libraries that take seconds to import. pyarrow and scipy come with transformers and the scores.
HEAVY = {"pytorch_lightning", "datasets", "matplotlib", "wandb"}


def name_imports(nodes: ast.AST) -> Iterator[str]:
    """Dotted names of what is imported anywhere below a node; `surgery` imports absolutely."""
    for node in ast.walk(nodes):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)


def list_late(tree: ast.Module) -> Iterator[str]:
    """What functions import, and what is imported for types alone."""
    for node in ast.walk(tree):
        checking = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        if checking or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from name_imports(node)


def find_file(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    found = [path.with_suffix(".py"), path / "__init__.py"]
    return next((file for file in found if file.is_file()), None)


@cache
def list_top(module: str) -> tuple[str, ...]:
    """What a module of ours imports when it is imported itself; nothing for others'."""
    file = find_file(module) if module.startswith("surgery.") else None
    if file is None:
        return ()
    body = ast.parse(file.read_text(encoding="utf-8")).body
    top = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
    return tuple(dict.fromkeys(name for node in top for name in name_imports(node)))


@cache
def is_heavy(module: str) -> bool:
    """Whether importing it imports a library that takes seconds."""
    reached, waiting = {module}, [module]
    while waiting:
        fresh = set(list_top(waiting.pop())) - reached
        reached |= fresh
        waiting += fresh
    return any(name.split(".")[0] in HEAVY for name in reached)


def test_no_circle() -> None:
    graph = {
        f"surgery.pipeline.{file.stem}": {
            name
            for name in name_imports(ast.parse(file.read_text(encoding="utf-8")))
            if name.startswith("surgery.pipeline.")
        }
        for file in FILES
    }
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert order[-1] == "surgery.pipeline.run"
    assert set(order) == set(graph)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_imports_are_late_where_they_take_seconds(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    light = [name for name in list_late(tree) if not is_heavy(name)]
    assert not light, f"{file.name} can import {light} at its top"


@pytest.mark.parametrize("name", ["check", "prepare", "run", "session", "stages"])
def test_a_run_that_only_plans_loads_nothing_heavy(name: str) -> None:
    assert not is_heavy(f"surgery.pipeline.{name}")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_no_operation_is_named(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    steps = {kind for operation in find_own_operations().values() for kind in operation.steps}
    said = [name for name in {*find_own_operations(), *steps} if re.search(rf"\b{name}\b", text)]
    assert not said
