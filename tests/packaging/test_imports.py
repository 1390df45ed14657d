"""Imports go one way: between rooms by a table, between files without a circle.

Every import counts, wherever it stands: at the top, under `TYPE_CHECKING`, in a function.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# The rooms of surgery/ (and callbacks/, last), each with the rooms it may import. A row names only
# rows above it, so no circle can be written down here.
BASE = {"errors", "console", "files", "units", "login"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "console": set(),
    "files": set(),
    "units": set(),
    "login": set(),
    "checkout": set(),
    "config": {"errors"},
    "models": {"config", "console", "errors", "files"},
    "data": {"models", "config", "console", "errors", "files"},
    "transforms": {"models", "config"},
    "observe": {"models", "data", "errors"},
    "verify": {"transforms", "models", "console", "errors"},
    "plan": {"verify", "transforms", "models", "config", "errors", "files", "units"},
    "record": {"plan", "models", "config", "errors"},
    "execute": {"record", "plan", "verify", "transforms", "models", "errors"},
    "importance": {"observe", "data", "models", "config", "console", "errors", "files"},
    "calibration": {
        "importance",
        "observe",
        "execute",
        "plan",
        "transforms",
        "data",
        "models",
        "console",
        "errors",
    },
    "operations": {
        "calibration",
        "importance",
        "observe",
        "execute",
        "plan",
        "verify",
        "transforms",
        "data",
        "models",
        "config",
        "console",
        "errors",
    },
    "training": {
        "importance",
        "execute",
        "plan",
        "data",
        "models",
        "config",
        "console",
        "errors",
        "files",
        "login",
    },
    "measure": {"plan", "data", "models", "config", "console", "errors"},
    "lab": {
        "measure",
        "training",
        "calibration",
        "importance",
        "observe",
        "plan",
        "data",
        "models",
        "config",
        *BASE,
    },
    "pipeline": {
        "lab",
        "measure",
        "training",
        "calibration",
        "importance",
        "execute",
        "record",
        "plan",
        "verify",
        "data",
        "models",
        "config",
        *BASE,
    },
    "refusals": {"plan", "config", "errors"},
    # The public names, each from where it is at home.
    "__init__": {
        "checkout",
        "record",
        "operations",
        "calibration",
        "importance",
        "observe",
        "execute",
        "plan",
        "models",
        "config",
        "errors",
    },
    "config.__main__": {"plan", "config", "console", "errors"},
    "hydra": {"plan", "config", "errors"},
    "cli": {"hydra", "pipeline", "refusals", "config", "errors"},
    "__main__": {"cli"},
    "callbacks": {"observe", "data", "models", *BASE},
}

# Libraries that a room must not know.
PLAIN = {"pytorch_lightning", "hydra", "wandb"}
MUST_NOT_IMPORT: dict[str, set[str]] = {
    "models": PLAIN,
    "transforms": {*PLAIN, "transformers"},
    "observe": PLAIN,
    "verify": PLAIN,
    "plan": PLAIN,
    "record": PLAIN,
    "execute": PLAIN,
    "calibration": PLAIN,
    "operations": PLAIN,
}
# The one file that trains.
MAY_ALSO_IMPORT = {"surgery/operations/prune_heads/gating.py": {"pytorch_lightning"}}
# An operation knows no architecture, but for the base of them all.
MODEL_NAME = re.compile(r"\*|\w*(For[A-Z]\w*|Model|Config)")
BASE_CLASSES = {"PreTrainedModel", "PreTrainedConfig"}

# What a comment beside a local import says of it.
WHY = re.compile(r"\btakes? seconds\b|# seconds,|\(seconds\)|\bhalf imported\b", re.I)

# Who may look at the lab: the core never does.
OVER_THE_LAB = {"lab", "pipeline"}


@dataclass(frozen=True)
class Import:
    """One import statement.

    Attributes:
        names: absolute dotted names of everything it loads.
        line: where it stands, from 1.
        local: whether it stands in a function.
    """

    names: tuple[str, ...]
    line: int
    local: bool


def room_of(path: Path) -> str:
    """A room's command (`python -m surgery.ROOM`) is a way in, and no part of the room."""
    top, *rest = path.relative_to(ROOT).parts
    if top == "surgery" and len(rest) == 2 and rest[1] == "__main__.py":
        return f"{rest[0]}.__main__"
    return top if top == "callbacks" else rest[0].removesuffix(".py")


def sources() -> list[Path]:
    return sorted([*ROOT.glob("surgery/**/*.py"), *ROOT.glob("callbacks/**/*.py")])


def read_imports(path: Path) -> Iterator[Import]:
    """Every import of a file, at whatever depth of its code."""
    inside = path.is_relative_to(ROOT / "surgery")
    parts = path.relative_to(ROOT / "surgery" if inside else ROOT).parent.parts
    package = ["surgery", *parts]
    todo: list[tuple[ast.AST, bool]] = [(ast.parse(path.read_text(encoding="utf-8")), False)]
    while todo:
        node, local = todo.pop()
        if isinstance(node, ast.Import):
            yield Import(tuple(alias.name for alias in node.names), node.lineno, local)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module or "").split(".")] if node.module else base
            # `from surgery import x` may name a module as well as a value.
            names = tuple(".".join([*module, alias.name]) for alias in node.names)
            yield Import(names, node.lineno, local)
        inner = local or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        todo.extend((child, inner) for child in ast.iter_child_nodes(node))


def test_every_room_has_its_place() -> None:
    assert {room_of(path) for path in sources()} == set(MAY_IMPORT)


def test_there_are_at_most_sixteen_rooms() -> None:
    rooms = {room_of(p) for p in sources() if p.is_relative_to(ROOT / "surgery")}
    folders = [room for room in rooms if (ROOT / "surgery" / room).is_dir()]
    assert len(folders) <= 16


def test_the_table_itself_goes_one_way() -> None:
    above: set[str] = set()
    for room, allowed in MAY_IMPORT.items():
        assert allowed <= above, f"{room} may import {sorted(allowed - above)}, which come later"
        above.add(room)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_follow_the_table(room: str) -> None:
    allowed = MAY_IMPORT[room] | {room}
    for path in (path for path in sources() if room_of(path) == room):
        for statement in read_imports(path):
            for name in statement.names:
                top, *rest = name.split(".")
                where = f"{path.relative_to(ROOT)}:{statement.line} imports {name}"
                assert top not in ("callbacks", "conf", "recipes", "tests", "train"), where
                banned = MUST_NOT_IMPORT.get(room, set())
                also = MAY_ALSO_IMPORT.get(path.relative_to(ROOT).as_posix(), set())
                assert top not in banned - also, where
                if top == "surgery" and rest and (ROOT / "surgery" / rest[0]).exists():
                    assert rest[0] in allowed, f"{where}; {room} may import {sorted(allowed)}"


def test_the_core_never_imports_the_lab() -> None:
    for path in sources():
        if room_of(path) in OVER_THE_LAB:
            continue
        for statement in read_imports(path):
            assert not any(name.startswith("surgery.lab") for name in statement.names), path


def names_an_architecture(name: str) -> bool:
    """Whether an imported name is, or gives, a model or a config of transformers."""
    top, *rest = name.split(".")
    if top != "transformers":
        return False
    if not rest or rest[0] == "models":
        return True
    return rest[-1] not in BASE_CLASSES and MODEL_NAME.fullmatch(rest[-1]) is not None


def test_operations_know_no_architecture() -> None:
    for path in (path for path in sources() if room_of(path) == "operations"):
        for statement in read_imports(path):
            assert not any(map(names_an_architecture, statement.names)), f"{path}:{statement.line}"


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("transformers.LlamaForCausalLM", True),
        ("transformers.AutoModelForMaskedLM", True),
        ("transformers.GPT2Model", True),
        ("transformers.MistralConfig", True),
        ("transformers.models.llama.modeling_llama.apply_rotary_pos_emb", True),
        ("transformers.models", True),
        ("transformers", True),  # and then transformers.LlamaModel
        ("transformers.*", True),
        ("transformers.PreTrainedModel", False),
        ("transformers.PreTrainedConfig", False),
        ("transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS", False),
        ("surgery.record.config.RecordConfig", False),
    ],
)
def test_a_name_of_an_architecture_is_seen(name: str, is_one: bool) -> None:
    assert names_an_architecture(name) == is_one


def test_an_import_in_a_function_says_what_it_costs() -> None:
    """On its line, above it or in the file's docstring: imports that wait are those of seconds.

    But for the reader of records, which is imported while transformers itself is.
    """
    silent = []
    for path in sources():
        text = path.read_text(encoding="utf-8")
        if WHY.search(ast.get_docstring(ast.parse(text)) or ""):
            continue
        lines = text.splitlines()
        local = sorted(s.line for s in read_imports(path) if s.local)
        told = set()
        for line in local:
            above = lines[line - 2].strip()
            # One comment serves the imports that follow each other.
            block = line - 1 in told or (above == "" and line - 2 in told)
            reasons = [lines[line - 1]] + ([above] if above[:1] == "#" else [])
            if block or any(map(WHY.search, reasons)):
                told |= set(range(line, _end(lines, line) + 1))
            else:
                silent.append(f"{path.relative_to(ROOT)}:{line}")
    assert not silent


def _end(lines: list[str], line: int) -> int:
    """The last line of the statement that begins at `line`."""
    if "(" not in lines[line - 1] or ")" in lines[line - 1]:
        return line
    return next(n for n in range(line, len(lines) + 1) if ")" in lines[n - 1])


def module_of(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "callbacks":
        parts = ["surgery", *parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_file_imports_itself_around_a_corner() -> None:
    """A package's `__init__` that hands on names of its own files is no corner."""
    modules = {module_of(path): path for path in sources()}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        found: set[str] = set()
        for statement in read_imports(path):
            for name in statement.names:
                target = name if name in modules else name.rpartition(".")[0]
                if target in modules and target != module:
                    found.add(target)
        if path.name == "__init__.py":
            found = {target for target in found if not target.startswith(f"{module}.")}
        graph[module] = found
    del graph["surgery"]  # the public names, at the top of everything
    circles = [circle for circle in find_circles(graph) if len(circle) > 1]
    assert not circles


def find_circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            circle = []
            while True:
                circle.append(stack.pop())
                if circle[-1] == node:
                    break
            found.append(sorted(circle))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


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
    found = list(read_imports(file))
    assert {name for statement in found for name in statement.names} == {
        "surgery.a",
        "surgery.b",
        "surgery.c.d",
        "surgery.plan.e",
        "surgery.f.g",
        "surgery.h.i",
        "surgery.j.k",
        "surgery.l",
    }
    assert [s.names for s in found if s.local] == [("surgery.h.i",)]


def test_a_circle_is_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert ["a", "b", "c"] in find_circles(graph)
