"""The calibration of `gqa`: layer by layer, each on the stream of those below as they will be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from surgery.calibration.case import Calibration
from surgery.calibration.grouping import Partition, make_contiguous_groups
from surgery.calibration.output import pose_problem, solve_output
from surgery.calibration.rows import put_parameter, to_plan_layout
from surgery.calibration.site_batches import SiteBatches
from surgery.calibration.stream import Stream, open_streams
from surgery.data.collate import Batch
from surgery.errors import ConfigError
from surgery.models.copies import make_sharing_copy
from surgery.models.sites import Site
from surgery.operations.gqa import solve
from surgery.operations.gqa.moments import SiteMoments
from surgery.operations.gqa.options import GQAOptions, Grouping, Merge
from surgery.operations.gqa.refine import refine
from surgery.operations.gqa.solve import SiteMerge
from surgery.operations.gqa.wide import (
    compute_output,
    make_moved_tensors,
    set_plain,
    set_wide,
)
from surgery.plan.amount import count_unknowns
from surgery.plan.resolution import SiteResolution
from surgery.transforms.head_edits import Merging

Batches = Sequence[Batch]
Advance = Callable[[str], None]
# Of merge=random, where a budget or the stream to later layers needs some.
STD = 0.02
# Passes over the batches for one site, at most: for progress.
PASSES = 3


def calibrate_sites(
    model: PreTrainedModel,
    sites: Sequence[tuple[Site, int]],
    operation: GQAOptions,
    batches: Batches,
    options: Calibration,
    advance: Advance,
) -> dict[str, SiteResolution]:
    """Decide how each site's KV heads become as many as wanted.

    Args:
        model: as the operations before left it; not changed.
        sites: with the KV heads each should have, in the order of the forward pass.
        advance: called after every batch.
    """
    # Repeated heads leave nothing to decide.
    merged = [(site, count) for site, count in sites if count < site.kv_heads]
    models = model, make_sharing_copy(model)
    original, working = open_streams(models, [site for site, _ in merged], batches)
    return {
        site.path: calibrate_site(original, working, site, count, operation, options, advance)
        for site, count in merged
    }


def calibrate_site(
    original: Stream,
    working: Stream,
    site: Site,
    count: int,
    operation: GQAOptions,
    options: Calibration,
    advance: Advance,
) -> SiteResolution:
    """Decide for one site, and let the working model compute the result from here on.

    Args:
        original: the batches in the original, whose outputs are aimed at.
        working: the same in a copy of it, operated on up to this site.
    """
    work = working.model
    runs = make_contiguous_groups(site.kv_heads, count)
    optimal = operation.merge is Merge.optimal
    given = operation.get_groups(site, count)
    similar = operation.grouping is Grouping.similarity and count > 1 and given is None
    keep = len(working.batches) if options.keep_batches is None else options.keep_batches
    text = SiteBatches(original, working, site, keep if optimal and options.refine_steps else 0)
    groups: Partition = runs if given is None else given
    if similar:
        first = _sum_moments(text, (), options, advance, "statistics")
        groups = solve.group_similar_heads(work, site, first, count)
    if groups != runs:
        _refuse_order(text, groups, operation)
    query = solve.order_heads(site, groups)
    figures = {"kv_heads": count, "groups": [list(group) for group in groups]}
    if not operation.rewrites:
        set_plain(work, site, query, groups, Merging(operation.merge.value, str(options.seed), STD))
        return SiteResolution(query, groups, {}, figures)
    if optimal or not similar:
        first = _sum_moments(
            text, groups if optimal else (), options, advance, "values" if similar else "statistics"
        )
    if optimal:
        merge = solve.merge_optimal(work, site, first, groups)
        few = 0 < text.folds.tokens < count_unknowns([site])
        if options.refine_steps and text.get_kept() and not few:
            merge, losses = refine(work, site, merge, text.get_kept(), text.folds, options)
            merge.losses.update(losses)
        if options.refit:
            merge = _refit_output(text, merge, options, advance)
    else:
        renorm = operation.merge is Merge.aligned_renorm
        merge = solve.merge_aligned(work, site, first, groups, renorm=renorm)
    set_wide(work, site, merge)
    return _make_resolution(site, merge, figures)


@torch.no_grad()
def _refuse_order(text: SiteBatches, groups: Partition, operation: GQAOptions) -> None:
    """Refuse `groups` if the site computes something else with its heads in their order.

    Some hold something for every head, a position bias for one, that does not move with it.

    Raises:
        ConfigError: it does not.
    """
    work, site = text.work, text.site
    seen = next(iter(text.iterate_views()))
    one_by_one = tuple((member,) for group in groups for member in group)
    query = solve.order_heads(site, groups)
    made = compute_output(
        work, site, make_moved_tensors(work, site, query, one_by_one), *seen.block
    ).double()
    assert seen.output is not None
    expected = seen.output.double()
    if seen.real is not None:
        made, expected = made[seen.real], expected[seen.real]
    rounding = max(torch.finfo(seen.output.dtype).eps, torch.finfo(torch.float32).eps)
    if not (made - expected).norm() <= rounding**0.5 * expected.norm():
        given = operation.groups
        raise ConfigError(
            operation.get_key("groups" if given else "grouping"),
            f"the heads of {site.path} cannot change places: something besides its projections "
            "belongs to each of them",
            given=given or Grouping.similarity.value,
            valid="null" if given else Grouping.contiguous.value,
        )


def _make_resolution(site: Site, merge: SiteMerge, figures: dict[str, object]) -> SiteResolution:
    tensors = {
        role: tensor.detach().float().cpu()
        for role, tensor in to_plan_layout(site, merge.tensors).items()
    }
    return SiteResolution(merge.query, merge.kv, tensors, {**figures, **merge.losses})


def _sum_moments(
    text: SiteBatches,
    groups: Partition | tuple[()],
    options: Calibration,
    advance: Advance,
    what: str,
) -> SiteMoments:
    site = text.site
    moments = SiteMoments(
        text.work, site, groups, options.rows, options.seed + site.layer, values=not groups
    )
    for view in text.iterate_views():
        moments.add(view)
        advance(f"layer {site.layer}: {what}")
    return moments


@torch.no_grad()
def _refit_output(
    text: SiteBatches, merge: SiteMerge, options: Calibration, advance: Advance
) -> SiteMerge:
    """Solve the output projection by ridge least squares, from its new input to its old output."""
    work, site = text.work, text.site
    before = set_wide(work, site, merge)
    problem = pose_problem(text, lambda: advance(f"layer {site.layer}: output"))
    for name, parameter in before.items():
        put_parameter(work.get_submodule(site.block), name, parameter)
    solved = solve_output(problem, options.ridge)
    # Spread out, its columns lie as in the source; the result's heads lie group by group.
    columns = solved.weight.unflatten(1, (-1, site.output.unit))[:, [h for (h,) in merge.query]]
    tensors = {**merge.tensors, "output": columns.flatten(1)}
    if solved.bias is not None:
        tensors["output_bias"] = solved.bias
    figures = {
        "output_error_merged": solved.before,
        "output_error_refit": solved.fitted,
        "output_error_held_out": solved.held_out,
        "ridge": solved.ridge,
    }
    return replace(merge, tensors=tensors, losses={**merge.losses, **figures})
