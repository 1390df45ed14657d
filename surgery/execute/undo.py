"""Leave a model as it was if an operation on it fails."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedConfig


@contextmanager
def undoing_failure(model: nn.Module) -> Iterator[None]:
    """If the block raises, put back every module, parameter, attribute, hook and config value.

    Tensors are not copied: the block may replace them, but must not write into them.
    """
    states = [_State(one) for one in _list_holders(model)]
    try:
        yield
    except BaseException:
        for state in states:
            state.restore()
        raise


def _list_holders(model: nn.Module) -> list[Any]:
    """List the modules and their configs with all parts, each once."""
    holders: dict[int, Any] = {}

    def add(holder: Any) -> None:
        if id(holder) not in holders:
            holders[id(holder)] = holder
            for value in vars(holder).values():
                if isinstance(value, (PreTrainedConfig, GenerationConfig)):
                    add(value)

    for module in model.modules():
        add(module)
    return list(holders.values())


class _State:
    """The attributes of an object, and what is in its containers."""

    def __init__(self, holder: Any) -> None:
        self.holder = holder
        self.attributes = dict(vars(holder))
        self.contents: dict[int, tuple[Any, Any]] = {}
        for value in self.attributes.values():
            self._keep(value)

    def _keep(self, value: Any) -> None:
        if not isinstance(value, (dict, list, set)) or id(value) in self.contents:
            return
        self.contents[id(value)] = value, copy.copy(value)
        for one in value.values() if isinstance(value, dict) else value:
            self._keep(one)

    def restore(self) -> None:
        vars(self.holder).clear()
        vars(self.holder).update(self.attributes)
        # In place: handles of hooks hold the containers themselves.
        for container, content in self.contents.values():
            container.clear()
            if isinstance(container, list):
                container.extend(content)
            else:
                container.update(content)
