"""The heads that a task could do without, and a model as it is without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from surgery.anatomy import Site
from surgery.importance.gates import Gates
from surgery.importance.table import ScoreTable
from surgery.operations.prune_heads import PruneHeads
from surgery.operations.scores import HeadScores
from surgery.tasks.agreement import Mask

# Of each layer's heads, where the run declares no pruning.
AMOUNT = 0.25


def masking(operations: Sequence[Any]) -> PruneHeads:
    """The `prune_heads` by which masks are made: the run's own, or a quarter of each layer."""
    for operation in operations:
        if isinstance(operation, PruneHeads) and operation.heads is None:
            return replace(operation, scores=None)
    return PruneHeads(amount=AMOUNT)


def mask_of(operation: PruneHeads, sites: Sequence[Site], table: ScoreTable) -> Mask:
    """Layer → query heads that `operation` would remove by these scores.

    Raises:
        ConfigError: as many cannot go.
    """
    sites = [s for s in sites if operation.layers is None or s.layer in operation.layers]
    return operation.choose(sites, HeadScores.of(table, sites))


def gates_of(model: nn.Module, sites: Sequence[Site], mask: Mask) -> Gates:
    """Gates that, while open, make `model` compute what it would without the heads of `mask`."""
    gates = {}
    for site in sites:
        gate = torch.ones(site.q_heads, device=next(model.parameters()).device)
        gate[list(mask.get(site.layer, ()))] = 0.0
        gates[site.path] = gate
    return Gates(model, sites, gates)
