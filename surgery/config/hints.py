"""Check plain data, as JSON holds it, against type hints, before anything is made of it."""

from __future__ import annotations

import math
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from surgery.config.options import COUNT, NOT_NEGATIVE, Range

# What torch can hold.
_MOST = 2**63 - 1
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}

# A size of something that is there, and one that may be zero.
Count = Annotated[int, COUNT]
Size = Annotated[int, NOT_NEGATIVE]


def find_misfit(value: Any, hint: Any, where: str = "") -> str | None:
    """Find the first part of `value` that does not fit a type hint.

    Args:
        hint: of plain data: ``None``, bool, int, float, str, ``Any``, sequences, mappings, unions
            of these, and dataclasses, which stand for mappings of their fields. A `Range` in an
            ``Annotated`` is a range of the number. Fields that are not compared are left out.
        where: path of `value`, for the message.

    Returns:
        ``<path>: must be <what is valid>, not <what is there>``; ``None`` if everything fits.
    """
    return next(_find(value, hint, where), None)


def _find(value: Any, hint: Any, where: str) -> Iterator[str]:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return
    if origin is Annotated:
        bounds = next(one for one in arguments[1:] if isinstance(one, Range))
        yield from _find(value, arguments[0], where)
        if value not in bounds:
            yield _format(where, str(bounds), value)
    elif origin in (Union, types.UnionType):
        yield from _find_in_union(value, arguments, where)
    elif is_dataclass(hint):
        yield from _find_in_fields(value, hint, where)
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            yield _format(where, "a mapping of names", value)
            return
        for key, item in value.items():
            yield from _find(item, arguments[1], f"{where}.{key}" if where else key)
    elif isinstance(origin, type) and issubclass(origin, Sequence):
        yield from _find_in_list(value, arguments, where)
    elif not _is_plain(value, hint):
        yield _format(where, _NAMES.get(hint, "null"), value)


def _find_in_union(value: Any, hints: Sequence[Any], where: str) -> Iterator[str]:
    faults = [next(_find(value, hint, where), None) for hint in hints]
    if None in faults:
        return
    # The option that is meant says most: not null, where something is given.
    meant = [fault for hint, fault in zip(hints, faults, strict=True) if hint is not types.NoneType]
    yield str(meant[0])


@cache
def _get_hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _find_in_fields(value: Any, hint: Any, where: str) -> Iterator[str]:
    if not isinstance(value, Mapping):
        yield _format(where, "a mapping of names", value)
        return
    known = {field.name: field for field in fields(hint) if field.compare}
    unknown = next((key for key in value if key not in known), None)
    if unknown is not None:
        yield f"{where or 'it'}: has an unknown key {unknown!r}"
    hints = _get_hints(hint)
    for name, field in known.items():
        path = f"{where}.{name}" if where else name
        if name in value:
            yield from _find(value[name], hints[name], path)
        elif field.default is MISSING and field.default_factory is MISSING:
            yield f"{path}: is missing"


def _find_in_list(value: Any, hints: Sequence[Any], where: str) -> Iterator[str]:
    if not isinstance(value, (list, tuple)):
        yield _format(where, "a list", value)
        return
    if len(hints) > 1 and hints[1] is not ...:  # a hint per item
        if len(value) != len(hints):
            yield _format(where, f"a list of {len(hints)}", value)
            return
    else:
        hints = [hints[0]] * len(value)
    for number, (item, hint) in enumerate(zip(value, hints, strict=True)):
        yield from _find(item, hint, f"{where}[{number}]")


def _is_plain(value: Any, hint: Any) -> bool:
    if hint in (None, types.NoneType):
        return value is None
    if hint is float:
        return type(value) in (int, float) and abs(value) <= _MOST and math.isfinite(value)
    if hint is int:
        return type(value) is int and abs(value) <= _MOST
    return isinstance(value, hint)


def _format(where: str, valid: str, value: Any) -> str:
    return f"{where or 'it'}: must be {valid}, not {shorten(value)}"


def shorten(value: Any, limit: int = 60) -> str:
    """Write a value of any size on one line of at most `limit` characters."""
    # Only the start of a large value is written at all.
    if isinstance(value, (list, tuple)) and len(value) > limit:
        return f"a list of {len(value)}"
    if isinstance(value, Mapping) and len(value) > limit:
        return f"a mapping of {len(value)} names"
    if isinstance(value, int) and abs(value) >= 10**limit:
        return "a number of many digits"
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
