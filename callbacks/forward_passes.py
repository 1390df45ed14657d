"""The forward passes of a model: which one runs now, and on what.

A training step may run a model once, twice (R-Drop, SimCSE), on parts of its batch, or on rows that
the batch does not hold under the model's own names (DPO).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel


class ForwardPasses:
    """Follows the passes of one model while it is open.

    A pass is an outermost call of the model, or of a part that is a transformers model itself.

    Args:
        model: the model.
        begin: called at the beginning of each pass with the module that is called, and its
            arguments by name.
    """

    def __init__(
        self, model: PreTrainedModel, begin: Callable[[nn.Module, Mapping[str, Any]], None]
    ) -> None:
        self._models = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
        self._begin = begin
        self._handles: list[RemovableHandle] = []
        self._depth = 0
        self._number = 0

    def open(self) -> None:
        if self._handles:
            return
        self._depth = 0
        for model in self._models:
            self._handles += [
                model.register_forward_pre_hook(self._enter, with_kwargs=True),
                model.register_forward_hook(self._leave, always_call=True),
            ]

    def close(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def identify(self) -> int:
        """Return a number for the pass that runs now.

        Outside a pass every call gets another number: gradient checkpointing runs single layers
        again, and so may anybody's code.
        """
        if self._depth == 0:
            self._number += 1
        return self._number

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._depth == 0:
            self._number += 1
            bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
            self._begin(module, {**bound, **bound.pop("kwargs", {})})
        self._depth += 1

    def _leave(self, *_: Any) -> None:
        self._depth -= 1
