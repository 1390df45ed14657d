"""Write the comments of `conf/` from the fields of the dataclasses.

`write_yaml` makes a file from a dataclass, `rewrite_comments` renews the comments of an existing
one. A comment is beside its key, aligned with its neighbours, or above it if the line would be too
long; the comment of a section is above it. The comment at the head of a file is not changed.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, fields, is_dataclass
from enum import Enum
from typing import Any, get_type_hints

import yaml

from surgery.config.options import (
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    find_dataclass,
    get_default,
    get_help,
    get_range,
)

_WIDTH = 100
# Comments of one section are in one column; keys longer than `_LONG` do not move it.
_COLUMN, _LONG = 25, 32
# Ranges that need no comment.
_PLAIN = (POSITIVE, NOT_NEGATIVE, COUNT)


@dataclass(frozen=True)
class Key:
    """What is known of a config key.

    Attributes:
        comment: empty if nothing is known; then a file keeps its own.
        keys: the keys of a section; ``None`` for a value.
    """

    comment: str = ""
    keys: Mapping[str, Key] | None = None


def describe_keys(kind: type) -> dict[str, Key]:
    """Describe the keys of a dataclass, in order."""
    hints = get_type_hints(kind)
    return {field.name: _describe_key(field, hints[field.name]) for field in fields(kind)}


def _describe_key(field: Field[Any], hint: Any) -> Key:
    section = find_dataclass(hint)
    if section is not None:
        return Key(get_help(field), describe_keys(section))
    return Key("; ".join(_describe_field(field, hint)))


def _describe_field(field: Field[Any], hint: Any) -> Iterator[str]:
    """Describe a field: its choices and its range, if the help does not name them, and the help."""
    text, bounds = get_help(field), get_range(field)
    if isinstance(hint, type) and issubclass(hint, Enum):
        choices = [member.name for member in hint]
        if not all(re.search(rf"\b{choice}\b", text) for choice in choices):
            yield " | ".join(choices)
    if text:
        yield text
    if bounds is not None and bounds not in _PLAIN and str(bounds) not in text:
        yield str(bounds)


def write_yaml(kind: type, name: str, head: str = "") -> str:
    """Write a YAML text with the section `name`: every field of a dataclass, with its default."""
    lines = [f"# {line}" for line in textwrap.wrap(head, _WIDTH - 2)]
    lines += [f"{name}:", *_write_values(kind, "  ")]
    return rewrite_comments("\n".join(lines) + "\n", {name: Key(keys=describe_keys(kind))})


def _write_values(kind: type, indent: str) -> Iterator[str]:
    for field in fields(kind):
        value = get_default(field)
        if is_dataclass(value):
            yield f"{indent}{field.name}:"
            yield from _write_values(type(value), f"{indent}  ")
        else:
            yield f"{indent}{field.name}: {_dump(value)}"


def _dump(value: Any) -> str:
    plain = value.name if isinstance(value, Enum) else value
    text = yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, width=float("inf"))
    return text.removesuffix("\n").removesuffix("\n...")


def rewrite_comments(text: str, keys: Mapping[str, Key]) -> str:
    """Renew the comments of a YAML text; values, order and all other lines stay.

    Args:
        keys: what is known of the keys; others are not changed.
    """
    old = text.splitlines()
    comments = _place(yaml.compose(text, yaml.SafeLoader), keys, old)
    head = next((n for n, line in enumerate(old) if not line.startswith("#")), len(old))
    lines: list[str] = []
    for number, line in enumerate(old):
        if number not in comments:
            lines.append(line)
            continue
        above, beside = comments[number]
        while len(lines) > head and lines[-1].lstrip().startswith("#"):
            lines.pop()
        if above and len(lines) == head:
            lines.append("")  # or it would become the head, or a part of it
        lines += [*above, beside]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class _Line:
    """A line with a known key: the text before its comment, and whether one may be beside it."""

    number: int
    text: str
    comment: str
    beside: bool


def _place(
    node: yaml.Node | None, keys: Mapping[str, Key], lines: list[str]
) -> dict[int, tuple[list[str], str]]:
    """Place the comments: number of a line with a known key → the lines above it, and the line."""
    if not isinstance(node, yaml.MappingNode) or node.flow_style:
        return {}
    found: list[_Line] = []
    placed: dict[int, tuple[list[str], str]] = {}
    for name, value in node.value:
        key = keys.get(name.value)
        if key is None:
            continue
        if key.keys is not None:
            placed |= _place(value, key.keys, lines)
        if key.comment:
            found.append(_read_line(name, value, key, lines))
    sizes = [len(line.text) for line in found if line.beside and len(line.text) <= _LONG]
    column = max([_COLUMN, *(size + 2 for size in sizes)])
    return placed | {line.number: _write_line(line, column) for line in found}


def _read_line(name: yaml.Node, value: yaml.Node, key: Key, lines: list[str]) -> _Line:
    number = name.start_mark.line
    text = lines[number]
    if isinstance(value, yaml.CollectionNode) and not value.flow_style:  # it begins below its key
        colon = text.index(":", name.end_mark.column)
        return _Line(number, text[: colon + 1], key.comment, beside=key.keys is None)
    if value.end_mark.line > number:
        return _Line(number, text, key.comment, beside=False)
    return _Line(number, text[: value.end_mark.column], key.comment, beside=True)


def _write_line(line: _Line, column: int) -> tuple[list[str], str]:
    if line.beside:
        for start in (column, len(line.text) + 2):
            beside = f"{line.text:<{start - 2}}  # {line.comment}"
            if len(beside) <= _WIDTH:
                return [], beside
    indent = line.text[: len(line.text) - len(line.text.lstrip())]
    above = textwrap.wrap(
        line.comment,
        _WIDTH,
        initial_indent=f"{indent}# ",
        subsequent_indent=f"{indent}# ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return above, line.text
