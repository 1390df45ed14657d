"""`data.part`: code that runs as before and has no prose in it, and the prose alone."""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.config.schema import Part
from surgery.data.parts import extract_part
from surgery.data.stdlib import find_stdlib_root, read_stdlib
from tests.data.making import data_config

# Files of the library that are full of prose, string statements and long comments.
FILES = (
    "ast.py",
    "argparse.py",
    "dataclasses.py",
    "email/message.py",
    "json/decoder.py",
    "tokenize.py",
)


class _Bare(ast.NodeTransformer):
    """Without statements that do nothing."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        value = node.value
        return None if isinstance(value, ast.Constant) and isinstance(value.value, str) else node

    def visit_Pass(self, node: ast.Pass) -> None:
        return None


def does(source: str) -> str:
    """What is left of a program's tree without strings and passes that stand alone."""
    return ast.dump(_Bare().visit(ast.parse(source)))


def comments(source: str) -> list[str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [token.string for token in tokens if token.type == tokenize.COMMENT]


def strings(source: str) -> list[str]:
    """Strings that stand alone as statements."""
    return [
        node.value.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]


def check_parts(source: str) -> None:
    """Code does the same and says nothing; every word that was said is in the prose."""
    code, prose = extract_part(source, Part.code), extract_part(source, Part.prose)
    assert code is not None
    assert prose is not None
    assert does(code) == does(source)
    assert comments(code) == []
    assert strings(code) == []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            assert ast.get_docstring(node) is None
    said = prose.split()
    for text in strings(source):
        assert inspect.cleandoc(text).strip() in prose
    for comment in comments(source)[2:]:  # the first lines may be for the kernel or the decoder
        if any(letter.isalpha() for letter in comment):
            assert set(comment.lstrip("#").split()) <= set(said)


@pytest.mark.parametrize("name", FILES)
def test_the_parts_of_a_real_file(name: str) -> None:
    source = (find_stdlib_root() / name).read_text(encoding="utf-8")
    check_parts(source)
    values = "\n".join(strings(source))  # where escapes are what they stand for
    prose = extract_part(source, Part.prose)
    assert prose is not None
    for line in prose.splitlines():
        assert line.strip() in source or line.strip() in values


WORDS = st.lists(
    st.sampled_from(["alpha", "beta", "it's", "é", "λ x", "#"]), min_size=1, max_size=3
).map(" ".join)
COMMENT = WORDS.map(lambda words: f"# {words}")
STRING = st.one_of(
    WORDS.map(lambda words: f'"{words}"'),
    WORDS.map(lambda words: f'"""{words}\n\n    {words}\n    """'),
    WORDS.map(lambda words: f'("{words}" "more")'),
    WORDS.map(lambda words: f'"{words}"; é = "kept # é"'),
    WORDS.map(lambda words: f'é = 1; "{words}"'),
    WORDS.map(lambda words: f'"{words}"  # {words}'),
)
SIMPLE = st.one_of(
    STRING,
    COMMENT,
    st.just("x = 1"),
    st.just("y = [  # one\n    1,\n    # two\n    2,\n]"),
    st.just('z = f"# {1}"'),
    st.just(""),
    st.just("v = \\\n    3  # three"),
    st.just("w = 4 \\\n# four"),
)


def _block(head: str, body: list[str]) -> str:
    return f"{head}\n" + textwrap.indent("\n".join([*body, "pass"]), "    ", lambda line: True)


def _bare(head: str, text: str) -> str:
    return f"{head}\n    {text}"


ONE_LINE = WORDS.map(lambda words: f'"{words}"')
HEADS = st.sampled_from(["class A:", "def f():", "if x:", "for a in ():", "async def g():"])
STATEMENT = st.recursive(
    SIMPLE | st.builds(_bare, HEADS, ONE_LINE) | st.builds("{} {}".format, HEADS, ONE_LINE),
    lambda inner: st.builds(_block, HEADS, st.lists(inner, min_size=1, max_size=4)),
    max_leaves=8,
)
SOURCE = st.lists(STATEMENT, max_size=6).map("\n".join)


@given(SOURCE)
def test_the_parts_of_any_small_source(source: str) -> None:
    try:
        ast.parse(source)
    except SyntaxError:  # indenting may have broken a string or a continued line
        assert extract_part(source, Part.code) is None
        return
    check_parts(source)


def test_neighbouring_comments_are_one_text() -> None:
    source = "#!/usr/bin/env python\n# one\n# two\n\n# three\nx = 1  # four\n# five\n#####\n# six\n"
    assert extract_part(source, Part.prose) == "one\ntwo\n\nthree\n\nfour\n\nfive\nsix\n\n"
    assert extract_part(source, Part.code) == "x = 1\n"
    assert extract_part(source, Part.all) == source


@pytest.mark.parametrize("source", ["x = = 1", "print 'two'", 'x = "', "\0", "if x:\n  a\n b"])
def test_what_is_no_python_has_no_parts(source: str) -> None:
    assert extract_part(source, Part.code) is None
    assert extract_part(source, Part.prose) is None


def test_parts_of_a_library(tmp_path: Path) -> None:
    (tmp_path / "both.py").write_text('"""Said."""\nx = 1\n')
    (tmp_path / "old.py").write_text("print 'no Python 3'\n")
    (tmp_path / "silent.py").write_text("x = 1\n")
    (tmp_path / "spoken.py").write_text('"""Said."""\n')
    (tmp_path / "windows.py").write_bytes(b'\xef\xbb\xbf"""Said."""\r\nx = 1\r\n')
    code, prose = read_stdlib(tmp_path, Part.code), read_stdlib(tmp_path, Part.prose)
    assert code == dict.fromkeys(["both.py", "silent.py", "windows.py"], "x = 1\n")
    assert prose == dict.fromkeys(["both.py", "spoken.py", "windows.py"], "Said.\n\n")


def test_a_key_of_the_config() -> None:
    assert data_config("stdlib").part is Part.all
    assert data_config("stdlib", part="prose").part is Part.prose
