"""Real sentences on every machine: the first of each docstring in the standard library."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from functools import lru_cache

from surgery.data.sources import is_held_out
from surgery.data.stdlib import read_stdlib

_HELD_OUT = 0.2  # of the files
_WORDS = range(5, 41)
_OWNERS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_END = re.compile(r"(?<=[.!?])\s")


@lru_cache(maxsize=1)
def sentences() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of 5 to 40 words, in the order of their files, no sentence twice: to learn from, held out."""
    halves: dict[bool, dict[str, None]] = {False: {}, True: {}}
    for path, text in read_stdlib().items():
        halves[is_held_out(path, _HELD_OUT)].update(dict.fromkeys(_first_sentences(text)))
    learnt, held_out = halves[False], halves[True]
    return tuple(learnt), tuple(text for text in held_out if text not in learnt)


def _first_sentences(source: str) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(source)
        except SyntaxError:
            return
    for node in ast.walk(tree):
        if not isinstance(node, _OWNERS):
            continue
        paragraph = (ast.get_docstring(node) or "").split("\n\n")[0]
        sentence = _END.split(" ".join(paragraph.split()), maxsplit=1)[0]
        if len(sentence.split()) in _WORDS:
            yield sentence
