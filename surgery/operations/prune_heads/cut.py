"""The physical cut of heads that training closed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from surgery.importance.choice import Heads
from surgery.models.sites import Site, find_sites
from surgery.operations.prune_heads.options import PruneOptions
from surgery.plan.make import make_plan


def check_cut(
    model: PreTrainedModel,
    sites: Sequence[Site],
    operation: PruneOptions,
    closed: Heads,
    *,
    native: bool = False,
) -> None:
    """Raises: ConfigError, where these heads cannot be cut. The model is not changed."""
    # A plan needs projections that hold their own weights.
    if not any(hasattr(module, "get_parameter_holder") for module in model.modules()):
        make_plan(model, [name_closed(model, sites, operation, closed)], native=native)


def name_closed(
    model: PreTrainedModel, sites: Sequence[Site], operation: PruneOptions, closed: Heads
) -> PruneOptions:
    """Make the operation that removes closed heads from this very model.

    Args:
        sites: of the model, by the numbers that `closed` goes by. A fresh look numbers them from
            0; those that an earlier operation removed are gone.
        closed: layer → query heads.
    """
    path = {site.layer: site.path for site in sites}
    number = {site.path: site.layer for site in find_sites(model).sites}
    heads = {number[path[layer]]: list(going) for layer, going in closed.items()}
    decided = operation.adopt_decision(heads)
    assert isinstance(decided, PruneOptions)
    return replace(decided, layers=None)
