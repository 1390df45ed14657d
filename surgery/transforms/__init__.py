"""The arithmetic: pure functions on tensors, named by plans. They know no module and no file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from surgery.transforms.heads import combine_heads, spread_heads
from surgery.transforms.mix import mix_heads, put_tensor, spread_given

Transform = Callable[..., list[torch.Tensor]]

TRANSFORMS: dict[str, Transform] = {
    "combine_heads": combine_heads,
    "mix_heads": mix_heads,
    "put_tensor": put_tensor,
}
# What stands for a transform's result in the source's own shape: the oracle of a rehearsal.
EQUIVALENTS: dict[str, Transform] = {
    "combine_heads": spread_heads,
    "mix_heads": spread_heads,
    "put_tensor": spread_given,
}


def register_transform(name: str, transform: Transform, equivalent: Transform) -> None:
    """Add an operation's own arithmetic.

    Args:
        transform: (tensors, **arguments) → results; pure.
        equivalent: (results, sources, **arguments) → tensors in the shapes of the sources that do
            what the results do: what the equivalence check compares with.

    Raises:
        ValueError: another function has that name.
    """
    if TRANSFORMS.setdefault(name, transform) is not transform:
        raise ValueError(f"there is a transform {name!r} already")
    EQUIVALENTS[name] = equivalent


def run_transform(
    name: str, tensors: Sequence[torch.Tensor], arguments: Mapping[str, Any]
) -> list[torch.Tensor]:
    """Look a transform up by name and run it.

    Args:
        tensors: an edit's sources, then the calibrated tensors that it names.
    """
    return TRANSFORMS[name](tensors, **arguments)


def run_equivalent(
    name: str,
    results: Sequence[torch.Tensor],
    sources: Sequence[torch.Tensor],
    arguments: Mapping[str, Any],
) -> list[torch.Tensor]:
    """Tensors in the shapes of the transform's sources that do what its results do."""
    return EQUIVALENTS[name](results, sources, **arguments)
