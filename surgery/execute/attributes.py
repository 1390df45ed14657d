"""Attributes of modules that state a shape or a head count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

Attributes = Mapping[str, Mapping[str, Any]]


def set_attributes(model: nn.Module, attributes: Attributes) -> None:
    """Set module path → attribute → value; a list becomes a tuple where one stood."""
    for path, values in attributes.items():
        module = model.get_submodule(path)
        for name, value in values.items():
            was_tuple = isinstance(vars(module).get(name), tuple)
            setattr(module, name, tuple(value) if was_tuple else value)


@contextmanager
def attributes_set(model: nn.Module, attributes: Attributes) -> Iterator[None]:
    """The same for a while."""
    before = {
        path: {name: vars(model.get_submodule(path)).get(name) for name in values}
        for path, values in attributes.items()
    }
    set_attributes(model, attributes)
    try:
        yield
    finally:
        set_attributes(model, before)
