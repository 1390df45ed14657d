"""One choice per layer, within bounds, that loses least: an integer programme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

# Per layer: choice → number.
Numbers = Sequence[Mapping[tuple[str, str], float]]
Picked = list[tuple[str, str]]
# Bounds are held to rounding, not to the last bit.
_ROUNDING = 1e-9


def choose(
    losses: Numbers, costs: Sequence[Numbers], most: Sequence[float], *, uniform: bool = False
) -> Picked | None:
    """Choose one key per layer with the least sum of losses; ``None``: no choice is within bounds.

    Exact (Puzzle does the same, Bercovich et al. 2024, arXiv:2411.19146, section 4.3).

    Args:
        losses: per layer, choice → loss.
        costs: per bound and layer, choice → cost.
        most: per bound, what costs may sum to.
        uniform: whether all layers get the same key, one that every layer has.
    """
    if uniform:
        return _choose_one(losses, costs, most)
    places = [(layer, key) for layer, found in enumerate(losses) for key in found]
    one_each = np.zeros((len(losses), len(places)))
    for column, (layer, _) in enumerate(places):
        one_each[layer, column] = 1
    constraints = [LinearConstraint(one_each, 1, 1)]
    for cost, bound in zip(costs, most, strict=True):
        row = np.array([cost[layer][key] for layer, key in places], dtype=float)
        unit = max(1.0, abs(bound))
        constraints.append(LinearConstraint(row[None] / unit, -np.inf, bound / unit + _ROUNDING))
    found = milp(
        [losses[layer][key] for layer, key in places],
        constraints=constraints,
        integrality=np.ones(len(places)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        return None
    picked = {layer: key for x, (layer, key) in zip(found.x, places, strict=True) if x > 0.5}
    return [picked[layer] for layer in range(len(losses))]


def _choose_one(losses: Numbers, costs: Sequence[Numbers], most: Sequence[float]) -> Picked | None:
    shared = [key for key in losses[0] if all(key in found for found in losses)]
    within = [
        key
        for key in shared
        if all(
            sum(layer[key] for layer in cost) <= bound * (1 + _ROUNDING)
            for cost, bound in zip(costs, most, strict=True)
        )
    ]
    if not within:
        return None
    best = min(within, key=lambda key: sum(found[key] for found in losses))
    return [best] * len(losses)
