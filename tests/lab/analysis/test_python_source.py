"""Relations in Python source, on snippets whose pairs were found by eye."""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

import pytest

from surgery.lab.analysis.python_source import RELATIONS, find_python_relations


def related(source: str) -> dict[str, list[tuple[str, str]]]:
    """Relation → (dependent, head), as ``word@line``, or ``word@line.n`` for the n-th there."""
    found = find_python_relations(source)
    assert found is not None

    def shown(word: int) -> str:
        start, end = found.words[word]
        line = found.text.count("\n", 0, start)
        same = [
            (a, b)
            for a, b in found.words
            if found.text[a:b] == found.text[start:end] and found.text.count("\n", 0, a) == line
        ]
        which = f".{same.index((start, end)) + 1}" if len(same) > 1 else ""
        return f"{found.text[start:end]}@{line + 1}{which}"

    return {name: [(shown(a), shown(b)) for a, b in pairs] for name, pairs in found.pairs.items()}


def test_every_relation_in_one_snippet() -> None:
    source = """\
    def area(width, height=2):
        total = width * height  # width, again
        if total > 3:
            return max(total, [1, 2][0])
        elif 'total (':
            total += 1
        else:
            for n in total.parts():
                print(n.name, end=width)
        return total
    """
    assert related(textwrap.dedent(source)) == {
        "bracket": [
            (")@1", "(@1"),
            ("]@4.1", "[@4.1"),
            ("]@4.2", "[@4.2"),
            (")@4", "(@4"),
            (")@8", "(@8"),
            (")@9", "(@9"),
        ],
        "branch": [("elif@5", "if@3"), ("else@7", "if@3")],
        "call": [(")@4", "max@4"), (")@8", "parts@8"), (")@9", "print@9")],
        "argument": [
            ("total@4", "max@4"),
            ("[@4.1", "max@4"),
            ("n@9", "print@9"),
            ("end@9", "print@9"),
        ],
        "attribute": [("parts@8", "total@8"), ("name@9", "n@9")],
        "return": [("return@4", "def@1"), ("return@10", "def@1")],
        "name": [
            ("width@2", "width@1"),
            ("height@2", "height@1"),
            ("total@3", "total@2"),
            ("total@4", "total@2"),
            ("total@8", "total@6"),
            ("n@9", "n@8"),
            ("width@9", "width@1"),
            ("total@10", "total@6"),
        ],
    }


@pytest.mark.parametrize(
    ("source", "pairs"),
    [
        # The value is read before the name is bound.
        ("x = 1\nx = x + 1\nx", [("x@2.2", "x@1"), ("x@3", "x@2.1")]),
        # Other scopes do not count: a function's body, a class's, a comprehension's.
        ("x = 1\ndef f():\n  return x\nclass C:\n  x\n[x for y in z]", []),
        ("def f(x):\n  def g(x):\n    x\n  x", [("x@3", "x@2"), ("x@4", "x@1")]),
        ("def f(a, b=a): pass", []),
        ("def f(): pass\nf()", [("f@2", "f@1")]),
        ("async def f(): pass\nf()", [("f@2", "f@1")]),
        ("import os.path as p, os.path\np, os", [("p@2", "p@1"), ("os@2", "os@1.2")]),
        ("from a import x as x\nx", [("x@2", "x@1.2")]),
        ("try:\n  pass\nexcept E as e:\n  e", [("e@4", "e@3")]),
        ("with a as b, b as c:\n  c", [("b@1.2", "b@1.1"), ("c@2", "c@1")]),
        ("[x for x in y if x]", [("x@1.3", "x@1.2")]),
        ("if (n := 1) > 0: n", [("n@1.2", "n@1.1")]),
        ("def f():\n  global x\n  x = 1\n  x", []),
        ("f = lambda x: x", [("x@1.2", "x@1.1")]),
        ("for i in i:\n  i", [("i@2", "i@1.1")]),
        ("x = 1\nf'{x} {y}'\nx", [("x@3", "x@1")]),
        ("é = 'ü'; ö = é", [("é@1.2", "é@1.1")]),
        ("x = 1\r\nx\r\n", [("x@2", "x@1")]),
    ],
)
def test_a_name_reads_the_last_binding_in_its_scope(
    source: str, pairs: list[tuple[str, str]]
) -> None:
    assert related(source).get("name", []) == pairs


def test_branches_belong_to_the_statement_in_their_column() -> None:
    source = """\
    try:
        for a in b:
            if c: d
            else: e
        else: f
    except G: h
    except I: j
    else: k
    finally: l
    while m:
        n if o else p
    else: q
    """
    assert related(textwrap.dedent(source))["branch"] == [
        ("else@4", "if@3"),
        ("else@5", "for@2"),
        ("except@6", "try@1"),
        ("except@7", "try@1"),
        ("else@8", "try@1"),
        ("finally@9", "try@1"),
        ("else@12", "while@10"),
    ]


def test_strings_and_comments_are_no_words() -> None:
    found = find_python_relations('f(\'a(\', """b\nc)""", 1)  # d(\n')
    assert found is not None
    assert [found.text[a:b] for a, b in found.words] == ["f", "(", ",", ",", "1", ")"]
    assert found.pairs["argument"] == [(4, 0)]


def test_what_is_no_python_is_none() -> None:
    assert find_python_relations("def f(:\n") is None
    assert find_python_relations("x = '\0'") is None


def test_real_source_gives_every_relation_with_the_right_words() -> None:
    """The tool's own reading of a library file, checked against the text itself."""
    source = Path(ast.__file__).read_text(encoding="utf-8")
    found = find_python_relations(source)
    assert found is not None
    assert set(found.pairs) == set(RELATIONS)
    word = [found.text[a:b] for a, b in found.words]
    for use, binding in found.pairs["name"]:
        assert word[use] == word[binding]
        assert binding < use
    for one, other in found.pairs["bracket"]:
        assert word[other] + word[one] in ("()", "[]", "{}")
    assert {word[head] for _, head in found.pairs["return"]} == {"def"}
    assert all(word[a] == ")" for a, _ in found.pairs["call"])
    calls = sum(isinstance(node, ast.Call) for node in ast.walk(ast.parse(source)))
    assert 0.8 * calls < len(found.pairs["call"]) <= calls
