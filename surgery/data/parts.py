"""Python source taken apart: what runs, and what people read in it.

Prose is comments and strings that stand alone as statements, docstrings above all. Such a string
does nothing when the program runs, so taking it out leaves the same program.
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from surgery.config.schema import Part

# The first is for the kernel, the second for the decoder (PEP 263): neither is English.
_NOT_PROSE = re.compile(r"#!|#.*?coding[:=]")
_BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")
_UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError)


@dataclass(frozen=True, order=True)
class _Piece:
    """A comment or a string statement: from and to where, as (line from 0, character)."""

    start: tuple[int, int]
    end: tuple[int, int]
    text: str
    comment: bool
    alone: bool  # a string that is all its block has, or that shares its line with a statement


def part_of(source: str, part: Part) -> str | None:
    """That part of a Python source; ``None`` where it cannot be read as Python 3.

    code: the source without comments and string statements, and without the lines that held
    nothing else; it parses to the same tree. prose: these alone, in their order, a blank line
    between them: strings without their indentation, neighbouring comment lines as one text. Lines
    of a comment without a letter in them are left out.
    """
    if part is Part.all:
        return source
    text = source.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    lines, found = text.split("\n"), _found(text)
    if found is None:
        return None
    return _code(lines, found) if part is Part.code else _prose(lines, found)


@lru_cache(maxsize=4096)  # finding them is all the work, and code and prose both need it
def _found(text: str) -> list[_Piece] | None:
    try:
        return sorted([*_strings(text, text.split("\n")), *_comments(text)])
    except _UNREADABLE:
        return None


def _strings(text: str, lines: list[str]) -> Iterator[_Piece]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes that some Python will refuse
        todo: list[ast.AST] = [ast.parse(text)]
    while todo:
        node = todo.pop()
        for name in _BLOCKS:  # expressions hold no statements, and most nodes are expressions
            block = getattr(node, name, None)
            if isinstance(block, list):
                todo.extend(block)
                yield from _string_statements(node, block, lines)


def _string_statements(owner: ast.AST, block: list[ast.stmt], lines: list[str]) -> Iterator[_Piece]:
    strings = [
        statement
        for statement in block
        if isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    ]
    needed = len(strings) == len(block) and not isinstance(owner, ast.Module)
    for number, statement in enumerate(strings):
        start, end = _places(statement, lines)
        before, after = lines[start[0]][: start[1]], lines[end[0]][end[1] :]
        crowded = bool(before.strip()) or after.lstrip().startswith(";")
        yield _Piece(
            start,
            end,
            statement.value.value,  # type: ignore[attr-defined]
            comment=False,
            alone=crowded or (needed and number == 0),
        )


def _places(node: ast.stmt, lines: list[str]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where a statement begins and ends, in characters; `ast` counts bytes of UTF-8."""
    assert node.end_lineno is not None
    assert node.end_col_offset is not None

    def place(line: int, offset: int) -> tuple[int, int]:
        return line - 1, len(lines[line - 1].encode()[:offset].decode())

    return place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset)


def _comments(text: str) -> Iterator[_Piece]:
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            (line, start), (_, end) = token.start, token.end
            yield _Piece((line - 1, start), (line - 1, end), token.string, True, False)


def _code(lines: list[str], found: list[_Piece]) -> str:
    left: list[str | None] = list(lines)
    for piece in reversed(found):  # from the end, so that earlier places stay where they are
        (first, start), (last, end) = piece.start, piece.end
        before, after = str(left[first])[:start], str(left[last])[end:]
        line = before + ("pass" if piece.alone else "") + after
        left[first : last + 1] = [line.rstrip() or None] + [None] * (last - first)
        above = left[first - 1] if first else None
        if above is not None and above.endswith("\\") and not line.strip():
            left[first - 1] = above[:-1].rstrip()  # it was continued to here, and no further
    return "\n".join(line for line in left if line is not None).lstrip("\n")


def _prose(lines: list[str], found: list[_Piece]) -> str:
    texts: list[str] = []
    above = -2  # the last line that was nothing but a comment
    for piece in found:
        line = piece.start[0]
        if not piece.comment:
            texts.append(inspect.cleandoc(piece.text).strip())
            continue
        if line < 2 and _NOT_PROSE.match(piece.text):
            continue
        whole = not lines[line][: piece.start[1]].strip()
        text = piece.text.lstrip("#").strip() if _lettered(piece.text) else ""
        if whole and above == line - 1 and texts:
            texts[-1] += f"\n{text}" if text else ""
        else:
            texts.append(text)
        above = line if whole else -2
    return "".join(f"{text}\n\n" for text in texts if text)


def _lettered(text: str) -> bool:
    return any(letter.isalpha() for letter in text)
