"""Split Python source into code and prose.

Prose is comments, and strings that are statements of their own (mostly docstrings). Such a string
does nothing when the program runs, so the program stays the same without it.
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

# A shebang and an encoding line (PEP 263) are comments, but no English.
_NOT_PROSE = re.compile(r"#!|#.*?coding[:=]")
_BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")
_UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError)


@dataclass(frozen=True, order=True)
class _Piece:
    """A comment or a string statement, with its start and end as (line from 0, character)."""

    start: tuple[int, int]
    end: tuple[int, int]
    text: str
    comment: bool
    alone: bool  # a string that is the whole block, or that shares its line with a statement


def extract_part(source: str, part: Part) -> str | None:
    """Extract a part of a Python source; ``None`` if it cannot be read as Python 3.

    code: the source without comments and string statements, and without the lines that hold
    nothing else. It parses to the same tree. prose: only the comments and string statements, in
    their order, with a blank line between them. Strings lose their indentation, neighbouring
    comment lines become one text, and comment lines without a letter are left out.
    """
    if part is Part.all:
        return source
    text = source.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    lines, pieces = text.split("\n"), _find_pieces(text)
    if pieces is None:
        return None
    return _extract_code(lines, pieces) if part is Part.code else _extract_prose(lines, pieces)


@lru_cache(maxsize=4096)  # code and prose both need the pieces, and to find them is slow
def _find_pieces(text: str) -> list[_Piece] | None:
    try:
        return sorted([*_find_strings(text, text.split("\n")), *_find_comments(text)])
    except _UNREADABLE:
        return None


def _find_strings(text: str, lines: list[str]) -> Iterator[_Piece]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # escapes that a later Python will refuse
        todo: list[ast.AST] = [ast.parse(text)]
    while todo:
        node = todo.pop()
        for name in _BLOCKS:  # expressions hold no statements, and most nodes are expressions
            block = getattr(node, name, None)
            if isinstance(block, list):
                todo.extend(block)
                yield from _find_string_statements(node, block, lines)


def _find_string_statements(
    owner: ast.AST, block: list[ast.stmt], lines: list[str]
) -> Iterator[_Piece]:
    strings = [
        statement
        for statement in block
        if isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    ]
    needed = len(strings) == len(block) and not isinstance(owner, ast.Module)
    for number, statement in enumerate(strings):
        start, end = _locate(statement, lines)
        before, after = lines[start[0]][: start[1]], lines[end[0]][end[1] :]
        crowded = bool(before.strip()) or after.lstrip().startswith(";")
        yield _Piece(
            start,
            end,
            statement.value.value,  # type: ignore[attr-defined]
            comment=False,
            alone=crowded or (needed and number == 0),
        )


def _locate(node: ast.stmt, lines: list[str]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Find start and end of a statement in characters; `ast` counts bytes of UTF-8."""
    assert node.end_lineno is not None
    assert node.end_col_offset is not None

    def to_characters(line: int, offset: int) -> tuple[int, int]:
        return line - 1, len(lines[line - 1].encode()[:offset].decode())

    return (
        to_characters(node.lineno, node.col_offset),
        to_characters(node.end_lineno, node.end_col_offset),
    )


def _find_comments(text: str) -> Iterator[_Piece]:
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            (line, start), (_, end) = token.start, token.end
            yield _Piece((line - 1, start), (line - 1, end), token.string, True, False)


def _extract_code(lines: list[str], pieces: list[_Piece]) -> str:
    left: list[str | None] = list(lines)
    for piece in reversed(pieces):  # from the end, so that the earlier places stay valid
        (first, start), (last, end) = piece.start, piece.end
        before, after = str(left[first])[:start], str(left[last])[end:]
        line = before + ("pass" if piece.alone else "") + after
        left[first : last + 1] = [line.rstrip() or None] + [None] * (last - first)
        above = left[first - 1] if first else None
        if above is not None and above.endswith("\\") and not line.strip():
            left[first - 1] = above[:-1].rstrip()  # the line continued only to this piece
    return "\n".join(line for line in left if line is not None).lstrip("\n")


def _extract_prose(lines: list[str], pieces: list[_Piece]) -> str:
    texts: list[str] = []
    above = -2  # the last line that held only a comment
    for piece in pieces:
        line = piece.start[0]
        if not piece.comment:
            texts.append(inspect.cleandoc(piece.text).strip())
            continue
        if line < 2 and _NOT_PROSE.match(piece.text):
            continue
        whole = not lines[line][: piece.start[1]].strip()
        text = piece.text.lstrip("#").strip() if _has_letters(piece.text) else ""
        if whole and above == line - 1 and texts:
            texts[-1] += f"\n{text}" if text else ""
        else:
            texts.append(text)
        above = line if whole else -2
    return "".join(f"{text}\n\n" for text in texts if text)


def _has_letters(text: str) -> bool:
    return any(letter.isalpha() for letter in text)
