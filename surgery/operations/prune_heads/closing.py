"""Which heads are closed in a round, of all that are to go."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from surgery.importance.choice import HeadCut, Heads, choose_heads
from surgery.importance.score_file import HeadScores
from surgery.importance.table import GROUPS
from surgery.models.sites import Site
from surgery.operations.prune_heads.options import PruneOptions


def choose_closing(
    operation: PruneOptions,
    sites: Sequence[Site],
    scores: HeadScores,
    closed: Mapping[int, Sequence[int]],
    share: float,
) -> tuple[Heads, Heads]:
    """Choose all heads that are closed after a round, `closed` included; and all that will be.

    What is to go at last is chosen anew by these scores, closed heads first. Of that, the cheapest
    of all layers are closed now, until it is `share` of it, to the nearest: always what is cut at
    once, a KV group or one head of every group.

    Args:
        sites: that may lose heads.

    Raises:
        ConfigError: so many heads cannot be removed.
    """
    scores = _rank_closed_first(scores, sites, closed)
    going = operation.choose(sites, scores)
    staying = {
        site.layer: [head for head in range(site.q_heads) if head not in going[site.layer]]
        for site in sites
    }
    amount = share * sum(map(len, going.values())) / sum(site.q_heads for site in sites)
    by_group = operation.unit == GROUPS
    now = HeadCut(
        amount=amount,
        count=None,
        together=True,
        by_group=by_group,
        empty=True,
        prefix=f"attention.{operation.name}",
    )
    return _drop_empty(choose_heads(sites, scores, now, staying)), _drop_empty(going)


def _drop_empty(heads: Heads) -> Heads:
    return {layer: found for layer, found in heads.items() if found}


def _rank_closed_first(
    scores: HeadScores, sites: Sequence[Site], closed: Mapping[int, Sequence[int]]
) -> HeadScores:
    heads = groups = None
    if scores.heads is not None:
        heads = {
            site.layer: [
                -math.inf if head in closed.get(site.layer, ()) else score
                for head, score in enumerate(scores.heads[site.layer])
            ]
            for site in sites
        }
    if scores.groups is not None:
        groups = {
            site.layer: [
                -math.inf if group * site.group_size in closed.get(site.layer, ()) else score
                for group, score in enumerate(scores.groups[site.layer])
            ]
            for site in sites
        }
    return HeadScores(heads, groups)
