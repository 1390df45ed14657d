"""Choose the heads that a task does not need, and run a model without them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from surgery.importance.choice import HeadCut, choose_heads
from surgery.importance.gates import Gates
from surgery.importance.score_file import HeadScores
from surgery.importance.table import ScoreTable
from surgery.lab.tasks.agreement import Mask
from surgery.models.sites import Site
from surgery.plan.operation import Operation

# Fraction of each layer's heads, if the run declares no pruning.
AMOUNT = 0.25


def choose_mask(operations: Sequence[Operation], sites: Sequence[Site], table: ScoreTable) -> Mask:
    """Choose the heads that the run's own pruning would remove with these scores.

    If the run declares no pruning, it is a quarter of each layer's heads.

    Returns:
        Layer → query heads.

    Raises:
        ConfigError: that many heads cannot be removed.
    """
    scores = HeadScores.from_table(table, sites)
    for operation in operations:
        mask = operation.choose_by(sites, scores)
        if mask is not None:
            return mask
    return choose_heads(sites, scores, HeadCut(AMOUNT, None))


def make_gates(model: nn.Module, sites: Sequence[Site], mask: Mask) -> Gates:
    """Make gates with which `model` computes as if it did not have the heads of `mask`."""
    gates = {}
    for site in sites:
        gate = torch.ones(site.q_heads, device=next(model.parameters()).device)
        gate[list(mask.get(site.layer, ()))] = 0.0
        gates[site.path] = gate
    return Gates(model, sites, gates)
