"""How many heads of one layer may go, tried one after the other."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

from surgery.calibration.case import Calibration
from surgery.calibration.output import pose_problem
from surgery.calibration.site_batches import SiteBatches
from surgery.calibration.stream import Stream
from surgery.importance.table import GROUPS
from surgery.models.sites import Site
from surgery.operations.prune_heads.compensation import Compensation
from surgery.operations.prune_heads.layer_heads import LayerHeads
from surgery.operations.prune_heads.options import PruneOptions
from surgery.operations.prune_heads.refit import list_columns
from surgery.plan.choice import Choice


def list_cuts(operation: PruneOptions, site: Site) -> list[Choice]:
    """List how many heads of a site can go, ascending."""
    if any(norm is not None and norm.size != site.head_dim for norm in (site.q_norm, site.k_norm)):
        return []  # it is taken over all heads together
    layer, found = _make_layer(operation, site), []
    each = site.group_size if operation.unit == GROUPS else site.kv_heads
    for moves in range(1, layer.count_moves(site.q_heads) + 1):
        left = site.q_heads - moves * each
        kv_heads = left // site.group_size if operation.unit == GROUPS else site.kv_heads
        if left == 0 and site.block != site.path:
            continue
        blocks = site.packing
        if blocks is not None and not blocks.grouped and left % blocks.blocks:
            continue
        name = f"{left} of {site.q_heads} heads" if left else "no attention"
        after = replace(site, q_heads=left, kv_heads=kv_heads) if left else None
        # Any: the first of each group stay, or whole groups.
        kept, size = left // site.kv_heads, site.group_size
        by_group = operation.unit == GROUPS
        gone = [h for h in range(site.q_heads) if (h >= left if by_group else h % size >= kept)]
        found.append(Choice(operation.name, name, after, gone))
    return found


def try_cuts(
    operation: PruneOptions, site: Site, original: Stream, working: Stream, options: Calibration
) -> Generator[Choice, None, None]:
    """Yield each of them while the working model computes it.

    Heads go in the order of `Surgeon`, each where least of the output is lost after the others made
    up for it.
    """
    choices = {len(choice.given): choice for choice in list_cuts(operation, site)}
    if not choices:
        return
    layer = _make_layer(operation, site)
    problem = pose_problem(SiteBatches(original, working, site, 0), lambda: None)
    compensation = Compensation(working.model, site, problem, options.ridge)
    compensation.choose_ridge(layer.list_left({0}))
    surgeon = compensation.make_surgeon(layer.list_left())
    for unit, heads in enumerate(layer.units):
        layer.costs[unit] = surgeon.compute_error(
            list_columns(site, heads).to(problem.weight.device)
        )
    gone: set[int] = set()
    for move in layer.order_moves(surgeon, layer.count_moves(site.q_heads)):
        gone.update(move)
        left = layer.list_left(gone)
        removed = [head for head in range(site.q_heads) if head not in set(left)]
        if len(removed) in choices:
            with compensation.trying(left):
                yield replace(choices[len(removed)], given=removed)


def _make_layer(operation: PruneOptions, site: Site) -> LayerHeads:
    return LayerHeads(
        site,
        by_group=operation.unit == GROUPS,
        protected=operation.parse_protected([site]).get(site.layer, ()),
        empty=operation.remove_attention,
    )
