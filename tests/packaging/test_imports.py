"""Imports go one way. The table is the architecture; a new package has to be given its place."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Each part of surgery/ (and callbacks/, last) with the parts it may import. A row names only rows
# above it, so no cycle can be written down here.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "console": set(),
    "files": set(),
    "units": set(),
    "login": set(),
    "config": {"errors"},
    "models": {"config", "console", "errors"},
    "data": {"config", "errors"},
    "anatomy": {"errors"},
    "observation": {"anatomy", "errors"},
    "importance": {
        "observation",
        "data",
        "anatomy",
        "models",
        "config",
        "console",
        "errors",
        "files",
    },
    "merging": set(),
    "analysis": {
        "merging",
        "importance",
        "observation",
        "data",
        "anatomy",
        "models",
        "config",
        "console",
        "errors",
        "files",
    },
    "rehouse": {"anatomy", "models", "errors"},
    "transforms": set(),
    "architecture": {"anatomy", "models", "errors"},
    "plan": {
        "architecture",
        "transforms",
        "rehouse",
        "anatomy",
        "models",
        "errors",
        "files",
        "units",
    },
    "operations": {"plan", "importance", "architecture", "anatomy", "errors"},
    "record": {"plan", "architecture", "models", "errors"},
    "execute": {
        "record",
        "plan",
        "architecture",
        "transforms",
        "rehouse",
        "anatomy",
        "models",
        "console",
        "errors",
    },
    "reload": {"execute", "record", "plan", "architecture", "models", "errors"},
    "calibration": {
        "merging",
        "importance",
        "observation",
        "execute",
        "operations",
        "plan",
        "transforms",
        "anatomy",
        "models",
        "config",
        "console",
        "errors",
    },
    "training": {
        "importance",
        "execute",
        "operations",
        "plan",
        "anatomy",
        "data",
        "models",
        "config",
        "console",
        "errors",
        "login",
    },
    "measure": {"anatomy", "models", "plan", "data", "config", "console", "errors"},
    "report": {"errors", "files", "units"},
    "dashboard": {"console", "errors", "login"},
    "tasks": {
        "measure",
        "operations",
        "importance",
        "data",
        "anatomy",
        "config",
        "errors",
    },
    "pipeline": {
        "tasks",
        "report",
        "measure",
        "analysis",
        "training",
        "calibration",
        "importance",
        "execute",
        "operations",
        "plan",
        "anatomy",
        "data",
        "models",
        "config",
        "console",
        "errors",
        "files",
        "units",
    },
    "refusals": {"operations", "config", "errors"},
    "__init__": {
        "reload",
        "calibration",
        "importance",
        "observation",
        "execute",
        "operations",
        "plan",
        "anatomy",
        "errors",
    },
    "config.__main__": {"plan", "config", "console", "errors"},
    "hydra": {"plan", "config"},
    "cli": {"hydra", "config", "refusals", "pipeline", "errors"},
    "__main__": {"cli"},
    "callbacks": {"observation", "data", "console", "errors", "files", "units"},
}

# Libraries that a part must not know, and why.
MUST_NOT_IMPORT: dict[str, set[str]] = {
    "anatomy": {"pytorch_lightning", "hydra", "wandb"},
    "plan": {"pytorch_lightning", "hydra", "wandb"},
    "architecture": {"pytorch_lightning", "hydra", "wandb"},
    "operations": {"pytorch_lightning", "hydra", "wandb", "transformers"},  # no model class
    "execute": {"pytorch_lightning", "hydra", "wandb"},
    "rehouse": {"pytorch_lightning", "hydra", "wandb"},
    "record": {"pytorch_lightning", "hydra", "wandb"},
    "reload": {"pytorch_lightning", "hydra", "wandb"},
    "transforms": {"pytorch_lightning", "hydra", "wandb", "transformers"},
    "observation": {"pytorch_lightning", "hydra", "wandb"},
    "models": {"pytorch_lightning", "hydra", "wandb"},
    "merging": {"pytorch_lightning", "hydra", "wandb", "transformers"},
    "calibration": {"pytorch_lightning", "hydra", "wandb"},
}


def part_of(path: Path) -> str:
    """A room's command (`python -m surgery.ROOM`) is a way in, and no part of the room."""
    top, *rest = path.relative_to(ROOT).parts
    if len(rest) == 2 and rest[1] == "__main__.py":
        return f"{rest[0]}.__main__"
    return top if top == "callbacks" else rest[0].removesuffix(".py")


def sources() -> list[Path]:
    return sorted([*ROOT.glob("surgery/**/*.py"), *ROOT.glob("callbacks/**/*.py")])


def imports(path: Path) -> Iterator[str]:
    """Absolute dotted names of everything `path` imports, at whatever depth of its code.

    Imports under `if TYPE_CHECKING` are left out: they name a type and load nothing.
    """
    package = [
        "surgery",
        *path.relative_to(ROOT / "surgery" if is_surgery(path) else ROOT).parent.parts,
    ]
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            todo.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module or "").split(".")] if node.module else base
            # `from surgery import x` may name a module as well as a value.
            yield from (".".join([*module, alias.name]) for alias in node.names)
        todo.extend(ast.iter_child_nodes(node))


def is_surgery(path: Path) -> bool:
    return path.is_relative_to(ROOT / "surgery")


def test_every_part_has_its_place() -> None:
    assert {part_of(path) for path in sources()} == set(MAY_IMPORT)


def test_the_table_itself_goes_one_way() -> None:
    above: set[str] = set()
    for part, allowed in MAY_IMPORT.items():
        assert allowed <= above, f"{part} may import {sorted(allowed - above)}, which come later"
        above.add(part)


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_follow_the_table(part: str) -> None:
    allowed = MAY_IMPORT[part] | {part}
    for path in sources():
        if part_of(path) != part:
            continue
        for name in imports(path):
            top, *rest = name.split(".")
            where = f"{path.relative_to(ROOT)} imports {name}"
            assert top not in ("callbacks", "conf", "recipes", "tests", "train"), where
            assert top not in MUST_NOT_IMPORT.get(part, ()), where
            if top == "surgery" and rest:
                assert rest[0] in allowed, f"{where}; {part} may import {sorted(allowed)}"


def test_callbacks_name_each_other_relatively() -> None:
    """So that the folder works under the name `surgery.callbacks` and no other."""
    for path in ROOT.glob("callbacks/**/*.py"):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert not (node.module or "").startswith("surgery.callbacks"), path
            if isinstance(node, ast.Import):
                assert not any(a.name.startswith("surgery.callbacks") for a in node.names), path


def test_the_reader_of_imports_sees_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard on the guard: each way to write an import is read as what it loads."""
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    file = tmp_path / "surgery" / "plan" / "x.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import surgery.a\n"
        "from surgery import b\n"
        "from surgery.c import d\n"
        "from . import e\n"
        "from ..f import g\n"
        "def later():\n    from surgery.h import i\n"
        "if TYPE_CHECKING:\n    from surgery.j import k\nelse:\n    import surgery.l\n"
    )
    assert set(imports(file)) == {
        "surgery.a",
        "surgery.b",
        "surgery.c.d",
        "surgery.plan.e",
        "surgery.f.g",
        "surgery.h.i",
        "surgery.l",
    }
