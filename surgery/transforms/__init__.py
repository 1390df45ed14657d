"""The arithmetic of plans: pure functions on tensors that know no modules and no files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from surgery.transforms.heads import (
    combine_heads,
    combine_tensors,
    spread_heads,
    spread_tensors,
)
from surgery.transforms.mix import mix_heads, put_tensor, spread_put_tensor

Transform = Callable[..., list[torch.Tensor]]

TRANSFORMS: dict[str, Transform] = {
    "combine_heads": combine_heads,
    "combine_tensors": combine_tensors,
    "mix_heads": mix_heads,
    "put_tensor": put_tensor,
}
# Each transform's equivalent in the shapes of its sources: the oracle of the equivalence check.
EQUIVALENTS: dict[str, Transform] = {
    "combine_heads": spread_heads,
    "combine_tensors": spread_tensors,
    "mix_heads": spread_heads,
    "put_tensor": spread_put_tensor,
}


def register_transform(name: str, transform: Transform, equivalent: Transform) -> None:
    """Add an operation's own arithmetic.

    Args:
        transform: (tensors, **arguments) → results; pure.
        equivalent: (results, sources, **arguments) → tensors in the shapes of the sources that
            compute the same as the results; the equivalence check uses them.

    Raises:
        ValueError: another function has that name.
    """
    if TRANSFORMS.setdefault(name, transform) is not transform:
        raise ValueError(f"there is already a transform {name!r}")
    EQUIVALENTS[name] = equivalent


def run_transform(
    name: str, tensors: Sequence[torch.Tensor], arguments: Mapping[str, Any]
) -> list[torch.Tensor]:
    """Look a transform up by name and run it.

    Args:
        tensors: the sources of an edit, then the calibrated tensors that it names.
    """
    return TRANSFORMS[name](tensors, **arguments)


def run_equivalent(
    name: str,
    results: Sequence[torch.Tensor],
    sources: Sequence[torch.Tensor],
    arguments: Mapping[str, Any],
) -> list[torch.Tensor]:
    """Make tensors in the shapes of a transform's sources that compute the same as its results."""
    return EQUIVALENTS[name](results, sources, **arguments)
