"""Cells of one model go together only where they come from the same weights."""

from __future__ import annotations

from collections.abc import Iterable


class MixedWeightsError(Exception):
    """Cells of one model come from different weights."""


def check_weights(found: Iterable[tuple[str, str]]) -> None:
    """Args: found: of each cell its model, and the identity of the weights it was measured with.

    Raises:
        MixedWeightsError: see there.
    """
    known: dict[str, str] = {}
    for model, weights in found:
        first = known.setdefault(model, weights)
        if weights != first:
            raise MixedWeightsError(
                f"cells of {model} come from different weights ({first}, {weights}): "
                "begin a new store, or measure them again (--again)"
            )
