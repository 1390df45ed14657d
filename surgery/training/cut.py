"""The physical cut of heads that training closed."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from surgery.anatomy import Site, find_sites
from surgery.execute.fuse import is_fused, unfuse_qkv_
from surgery.execute.live import apply_
from surgery.operations.head_lists import Heads
from surgery.operations.prune_heads import PruneHeads
from surgery.plan.make import make_plan
from surgery.plan.plan import Plan


def check_cut(
    model: PreTrainedModel,
    sites: Sequence[Site],
    operation: PruneHeads,
    closed: Heads,
    *,
    native: bool = False,
) -> None:
    """Raises: ConfigError, where these heads cannot be cut. The model is not changed."""
    if not is_fused(model):  # a plan needs projections apart
        _plan(model, sites, operation, closed, native)


def cut_closed_(
    model: PreTrainedModel, sites: Sequence[Site], operation: PruneHeads, closed: Heads
) -> PreTrainedModel:
    """Remove heads that training closed, in place: an ordinary plan with explicit heads.

    The result computes what the model computes with these heads gated to 0. Fused projections are
    taken apart.

    Args:
        model: trained, its gates detached.
        sites: of the model, by the numbers that `closed` goes by.
        closed: layer → query heads.
    """
    unfuse_qkv_(model)
    return apply_(model, _plan(model, sites, operation, closed, native=False))


def _plan(
    model: PreTrainedModel,
    sites: Sequence[Site],
    operation: PruneHeads,
    closed: Heads,
    native: bool,
) -> Plan:
    # A fresh look numbers the sites from 0; those that an earlier operation removed are gone.
    path = {site.layer: site.path for site in sites}
    number = {site.path: site.layer for site in find_sites(model).sites}
    heads = {number[path[layer]]: list(going) for layer, going in closed.items()}
    decided = PruneHeads(heads=heads, remove_attention=operation.remove_attention)
    return make_plan(model, [decided], native=native)
