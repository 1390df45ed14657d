"""What `prune_heads` leaves open: which heads go, by an estimator's scores; and the refit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from surgery.calibration.case import Case
from surgery.errors import ConfigError
from surgery.importance import ScoreTable
from surgery.importance.choice import Heads
from surgery.importance.estimate import score_heads
from surgery.importance.score_file import HeadScores, is_score
from surgery.models.sites import Site
from surgery.operations.prune_heads.elimination import eliminate
from surgery.operations.prune_heads.options import PruneOptions
from surgery.operations.prune_heads.refit import refit_sites
from surgery.plan.layers import keep_layers
from surgery.plan.resolution import Resolution, SiteResolution
from surgery.transforms.head_edits import keep_heads

# These measure no loss.
_WITHOUT_LABELS = ("output_norm", "random")


def resolve_pruning(operation: PruneOptions, case: Case) -> tuple[PruneOptions, Resolution]:
    """Raises: ConfigError, for heads that cannot be scored, or a site that cannot be refitted."""
    sites = keep_layers(case.sites, operation.layers)
    if operation.eliminates:
        removed, costs = eliminate(operation, sites, case)
        figures = {site.path: _list_costs(operation, costs[site.layer]) for site in sites}
    else:
        removed, figures = _choose_by_scores(operation, sites, case)
    found = {}
    for site in sites:
        gone = removed.get(site.layer, [])
        left = [head for head in range(site.q_heads) if head not in gone]
        groups = sorted({head // site.group_size for head in left})
        found[site.path] = SiteResolution(
            keep_heads(left), keep_heads(groups), {}, {"removed": gone, **figures[site.path]}
        )
    if operation.refits:
        found = _refit_outputs(case, sites, found)
    return operation, found


def _list_costs(operation: PruneOptions, costs: Sequence[float]) -> dict[str, Any]:
    return {"estimator": operation.estimator, "unit": operation.unit, "scores": list(costs)}


def _choose_by_scores(
    operation: PruneOptions, sites: Sequence[Site], case: Case
) -> tuple[Heads, dict[str, dict[str, Any]]]:
    """Choose heads by their scores: layer → query heads, and what is known of each site."""
    scores, table = None, None
    if operation.estimator is not None:
        table = _make_table(operation, sites, case)
        scores = HeadScores.from_table(table, sites)
        _refuse_nan(operation, sites, scores)
    # Some layers may be gone: a file was compared with all of them when the plan was made.
    removed = operation.choose(sites, scores)
    return removed, {site.path: _collect_figures(operation, table, site) for site in sites}


def _make_table(operation: PruneOptions, sites: Sequence[Site], case: Case) -> ScoreTable:
    estimator = operation.estimator
    assert estimator is not None
    if case.scorer is not None:
        return case.scorer(case.model, sites, estimator, operation.unit)
    if estimator not in _WITHOUT_LABELS and any("labels" not in one for one in case.batches):
        raise ConfigError(
            operation.get_key("estimator"),
            "measures a loss, and the calibration data has no labels",
            given=estimator,
            valid=f"batches with `labels`, or {' or '.join(_WITHOUT_LABELS)}",
        )
    return score_heads(
        case.model,
        case.batches,
        estimator,
        sites=sites,
        units=(operation.unit,),
        seed=case.options.seed,
    )


def _refuse_nan(operation: PruneOptions, sites: Sequence[Site], scores: HeadScores) -> None:
    for site in sites:
        for rows in (scores.heads, scores.groups):
            if rows is not None and not all(is_score(score) for score in rows[site.layer]):
                raise ConfigError(
                    operation.get_key("estimator"),
                    f"gives heads of {site.path} no finite score",
                    given=operation.estimator,
                )


def _collect_figures(
    operation: PruneOptions, table: ScoreTable | None, site: Site
) -> dict[str, Any]:
    if table is None:
        return {}
    (of_site,) = (one for one in table.get_scores(operation.unit) if one.site == site.path)
    return {
        "estimator": operation.estimator,
        "unit": operation.unit,
        "scores": list(of_site.scores),
        "standard_errors": [x if math.isfinite(x) else None for x in of_site.errors],
    }


def _refit_outputs(
    case: Case, sites: Sequence[Site], found: Mapping[str, SiteResolution]
) -> dict[str, SiteResolution]:
    left = {path: [head for (head,) in one.query] for path, one in found.items()}
    made = refit_sites(case.model, sites, left, case.batches, case.options).sites
    resolved = dict(found)
    for path, refit in made.items():
        figures = {**found[path].figures, **refit.figures}
        resolved[path] = replace(found[path], tensors=refit.tensors, figures=figures)
    return resolved
