"""Combine the scores of several tasks into one table, for one mask for all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from surgery.config.schema import Combine
from surgery.errors import SurgeryError
from surgery.importance.table import ScoreTable, SiteScores


def combine_scores(
    tables: Mapping[str, ScoreTable],
    how: Combine = Combine.worst,
    weights: Mapping[str, float] | None = None,
) -> ScoreTable:
    """Combine the tables of several tasks into one.

    Tasks have different losses, and so scores of different size. Therefore the scores of each task
    are first divided by the sum of their absolute values. worst: the score of a head is its
    maximum over tasks. weighted: it is the mean with `weights`, with errors as of independent
    tasks.

    Args:
        tables: task → table; all of the same sites and units.
        weights: task → weight, for ``weighted``; ``None``: all equal.

    Raises:
        SurgeryError: there are no tables, the tables have different heads, or the weights are
            those of other tasks or all zero.
    """
    if not tables:
        raise SurgeryError("there are no score tables to combine")
    weight_of = dict.fromkeys(tables, 1.0) if weights is None else dict(weights)
    total = sum(weight_of.values())
    if set(weight_of) != set(tables) or not total > 0 or min(weight_of.values()) < 0:
        raise SurgeryError(
            f"weights of {sorted(weight_of)} for tables of {sorted(tables)}, or all 0"
        )
    share = [weight_of[name] / total for name in tables]
    every, first = list(tables.values()), next(iter(tables.values()))
    estimators = {table.estimator for table in every}
    return ScoreTable(
        estimator=f"{how.value} of {', '.join(sorted(estimators))}",
        objective=first.objective,
        heads=_combine_sites([table.heads for table in every], how, share),
        groups=_combine_sites([table.groups for table in every], how, share),
        model=first.model,
        data=", ".join(tables),
        batches=sum(table.batches for table in every),
        tokens=sum(table.tokens for table in every),
        seed=first.seed,
        loss=None,
        unit_of_scores="share of a task's scores",
    )


def _combine_sites(
    tables: Sequence[tuple[SiteScores, ...] | None], how: Combine, share: Sequence[float]
) -> tuple[SiteScores, ...] | None:
    present = [table for table in tables if table is not None]
    if not present:
        return None
    shapes = {tuple((one.layer, one.site, len(one.scores)) for one in table) for table in present}
    if len(present) < len(tables) or len(shapes) > 1:
        raise SurgeryError("these score tables are of different heads")
    sums = [sum(abs(score) for one in table for score in one.scores) for table in present]
    scale = [1 / total if total > 0 else 0.0 for total in sums]
    return tuple(
        _combine_site([table[place] for table in present], scale, how, share)
        for place in range(len(present[0]))
    )


def _combine_site(
    sites: Sequence[SiteScores], scale: Sequence[float], how: Combine, share: Sequence[float]
) -> SiteScores:
    scores, errors = [], []
    for head in range(len(sites[0].scores)):
        values = [one.scores[head] * factor for one, factor in zip(sites, scale, strict=True)]
        spread = [one.errors[head] * factor for one, factor in zip(sites, scale, strict=True)]
        if how is Combine.worst:
            most = max(range(len(values)), key=values.__getitem__)
            scores.append(values[most])
            errors.append(spread[most])
        else:
            scores.append(sum(w * value for w, value in zip(share, values, strict=True)))
            errors.append(math.hypot(*(w * e for w, e in zip(share, spread, strict=True))))
    return SiteScores(sites[0].layer, sites[0].site, tuple(scores), tuple(errors))
