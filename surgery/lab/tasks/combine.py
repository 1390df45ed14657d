"""The scores of several tasks made one, for a mask that all of them live under."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from surgery.config.schema import Combine
from surgery.errors import SurgeryError
from surgery.importance.table import ScoreTable, SiteScores


def combined(
    tables: Mapping[str, ScoreTable],
    how: Combine = Combine.worst,
    weights: Mapping[str, float] | None = None,
) -> ScoreTable:
    """One table: what each head is worth to all tasks together.

    Tasks differ in their losses and so in the size of their scores. Each is divided by the sum of
    its absolute scores first, and what is combined are shares: a task whose scores are all
    multiplied by one number changes nothing. worst: a head is worth what the task that needs it
    most says (the maximum). weighted: the mean by `weights`, with errors as of independent tasks.

    Args:
        tables: by task, of the same sites and units.
        weights: task → weight, for ``weighted``; equal ones if ``None``.

    Raises:
        SurgeryError: no tables, tables of different heads, or weights of other tasks or of nothing.
    """
    if not tables:
        raise SurgeryError("there are no score tables to combine")
    given = dict.fromkeys(tables, 1.0) if weights is None else dict(weights)
    if set(given) != set(tables) or not sum(given.values()) > 0 or min(given.values()) < 0:
        raise SurgeryError(f"weights of {sorted(given)} for tables of {sorted(tables)}, or all 0")
    share = [given[name] / sum(given.values()) for name in tables]
    every, first = list(tables.values()), next(iter(tables.values()))
    what = {table.estimator for table in every}
    return ScoreTable(
        estimator=f"{how.value} of {', '.join(sorted(what))}",
        objective=first.objective,
        heads=_sites([table.heads for table in every], how, share),
        groups=_sites([table.groups for table in every], how, share),
        model=first.model,
        data=", ".join(tables),
        batches=sum(table.batches for table in every),
        tokens=sum(table.tokens for table in every),
        seed=first.seed,
        loss=None,
        unit_of_scores="share of a task's scores",
    )


def _sites(
    tables: Sequence[tuple[SiteScores, ...] | None], how: Combine, share: Sequence[float]
) -> tuple[SiteScores, ...] | None:
    found = [table for table in tables if table is not None]
    if not found:
        return None
    shapes = {tuple((one.layer, one.site, len(one.scores)) for one in table) for table in found}
    if len(found) < len(tables) or len(shapes) > 1:
        raise SurgeryError("these score tables are of different heads")
    sums = [sum(abs(score) for one in table for score in one.scores) for table in found]
    scale = [1 / total if total > 0 else 0.0 for total in sums]
    return tuple(
        _site([table[place] for table in found], scale, how, share)
        for place in range(len(found[0]))
    )


def _site(
    sites: Sequence[SiteScores], scale: Sequence[float], how: Combine, share: Sequence[float]
) -> SiteScores:
    scores, errors = [], []
    for head in range(len(sites[0].scores)):
        values = [one.scores[head] * factor for one, factor in zip(sites, scale, strict=True)]
        spread = [one.errors[head] * factor for one, factor in zip(sites, scale, strict=True)]
        if how is Combine.worst:
            needs = max(range(len(values)), key=values.__getitem__)
            scores.append(values[needs])
            errors.append(spread[needs])
        else:
            scores.append(sum(w * value for w, value in zip(share, values, strict=True)))
            errors.append(math.hypot(*(w * e for w, e in zip(share, spread, strict=True))))
    return SiteScores(sites[0].layer, sites[0].site, tuple(scores), tuple(errors))
