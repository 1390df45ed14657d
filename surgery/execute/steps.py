"""Steps: what a plan does to a live model besides editing tensors, by name.

Each step is a function of a model and plain arguments. It works on the meta device too, and doing
it twice does no more than doing it once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedModel

StepFunction = Callable[..., None]
_REGISTRY: dict[str, StepFunction] = {}


def step(kind: str) -> Callable[[StepFunction], StepFunction]:
    """Function decorator: makes a step known under the name that plans and records use."""

    def register(function: StepFunction) -> StepFunction:
        _REGISTRY[kind] = function
        return function

    return register


def run_step(kind: str, model: PreTrainedModel, arguments: Mapping[str, Any]) -> None:
    """Look a step up by name and do it.

    Raises:
        KeyError: there is no such step.
    """
    _REGISTRY[kind](model, **arguments)


def is_step(kind: str) -> bool:
    return kind in _REGISTRY
