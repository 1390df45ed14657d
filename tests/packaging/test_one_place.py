"""An operation is one thing: nothing outside its place says its name, its steps or its class."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from surgery.plan.operation import Operation
from surgery.plan.registry import find_operations

from .conftest import ROOT

# Also keys of transformers' configs, which other rooms read: there the word alone means nothing.
ALSO_CONFIG_KEYS = {"attention_dropout", "sliding_window"}
# Plain words: only where they are all of a string.
WORDS = {"backend", "rope"}
# The public names, each from where it is at home.
ENTRY = ROOT / "surgery" / "__init__.py"


def place_of(operation: type[Operation]) -> Path:
    """The file or folder that holds all of an operation."""
    parts = operation.__module__.split(".")
    assert parts[:2] == ["surgery", "operations"]
    file = ROOT / "surgery" / "operations" / f"{parts[2]}.py"
    return file if file.is_file() else file.with_suffix("")


def strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every string of a file, docstrings and pieces of f-strings too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every name that is used or imported, and every module that is imported from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or ""
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)


def says(text: str, word: str) -> bool:
    """Whether a string speaks of an operation or of a step by its name."""
    if re.search(rf"\battention\.{word}\b", text) or re.search(rf"\boperations\.{word}\b", text):
        return True
    if word in ALSO_CONFIG_KEYS:
        return False
    if word in WORDS:
        return text == word
    return bool(re.search(rf"\b{word}\b", text))


@pytest.mark.parametrize("name", sorted(find_operations()))
def test_nobody_else_says_its_name(name: str) -> None:
    operation = find_operations()[name]
    place, words = place_of(operation), {name, *operation.steps}
    module = ".".join(operation.__module__.split(".")[:3])
    found = []
    for path in [*ROOT.glob("surgery/**/*.py"), *ROOT.glob("callbacks/*.py"), ROOT / "train.py"]:
        if path in (ENTRY, place) or place in path.parents:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += [
            f"{path.relative_to(ROOT)}:{line}: {word}"
            for line, text in strings(tree)
            for word in words
            if says(text, word)
        ]
        found += [
            f"{path.relative_to(ROOT)}:{line}: {used}"
            for line, used in names(tree)
            if used == operation.__name__ or used == module or used.startswith(f"{module}.")
        ]
    assert not found


def test_what_counts_as_saying_it() -> None:
    assert says("prune_heads", "prune_heads")
    assert says("as `prune_heads` takes them", "prune_heads")
    assert not says("prune_heads_of_layer", "prune_heads")
    assert says("backend", "backend")
    assert says("attention.backend.implementation=sdpa", "backend")
    assert not says("the attention backend sdpa", "backend")
    assert not says("sliding_window", "sliding_window")
    assert says("attention.sliding_window.size", "sliding_window")


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "README.md"])
def test_the_operation_in_the_pages_is_the_one_that_is_tested(page: str) -> None:
    code = (ROOT / "tests/packaging/outside/attention_temperature.py").read_text(encoding="utf-8")
    assert f"```python\n{code}```" in (ROOT / page).read_text(encoding="utf-8")
