"""HTML as nested calls: what is not made here is text, and is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

_VOID = {"br", "input", "meta"}


class Markup(str):
    """Text that is HTML already."""


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """An element.

    Args:
        children: text, elements, sequences of both; ``None`` is left out.
        attributes: ``class_`` for ``class``, underscores for hyphens; ``True`` for an attribute
            without a value, ``None`` or ``False`` for none.
    """
    opened = name
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        opened += f" {key}" if value is True else f' {key}="{escape(str(value))}"'
    if name in _VOID:
        return Markup(f"<{opened}>")
    return Markup(f"<{opened}>{''.join(map(_html, children))}</{name}>")


def join(*children: Any) -> Markup:
    """Elements and text, one after the other."""
    return Markup("".join(map(_html, children)))


def section(identity: str, title: str, *children: Any) -> Markup:
    """A part of the page with a heading of its own; empty where all children are ``None``."""
    if all(child is None for child in children):
        return Markup()
    heading = tag("h2", title, id=f"{identity}-title")
    return tag("section", heading, *children, id=identity, aria_labelledby=f"{identity}-title")


def table(
    head: Sequence[str], rows: Sequence[Sequence[Any]], label: str, *, text: Sequence[int] = (0,)
) -> Markup:
    """A table that scrolls within itself; the first cell of a line names it.

    Args:
        text: columns that hold text; the others are numbers, and are set to the right.
    """
    kinds = [None if place in text else "number" for place in range(len(head))]
    columns = [
        tag("th", name, scope="col", class_=kind) for name, kind in zip(head, kinds, strict=True)
    ]
    lines = []
    for first, *others in rows:
        cells = [tag("td", cell, class_=kind) for cell, kind in zip(others, kinds[1:], strict=True)]
        lines.append(tag("tr", tag("th", first, scope="row"), cells))
    whole = tag("table", tag("thead", tag("tr", columns)), tag("tbody", lines))
    return tag("div", whole, class_="scroll", role="region", aria_label=label)


def bar(share: float, kind: str = "") -> Markup:
    """A horizontal bar, `share` of its full length."""
    width = f"{100 * min(max(share, 0.0), 1.0):.2f}"
    return tag(
        "svg",
        tag("rect", width=width, height=8),
        class_=f"bar {kind}".strip(),
        viewBox="0 0 100 8",
        preserveAspectRatio="none",
        aria_hidden="true",
    )


def fold(title: str, *children: Any) -> Markup:
    """Something to be opened by those who want it."""
    return tag("details", tag("summary", title), *children)


def code(text: str) -> Markup:
    """A block of code that can be copied."""
    return tag("div", tag("pre", tag("code", text), tabindex=0), class_="code")


def _html(child: Any) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return child
    if isinstance(child, list | tuple):
        return "".join(map(_html, child))
    return escape(str(child))
