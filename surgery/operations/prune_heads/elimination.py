"""`elimination`: heads go in rounds, each where least is lost after the others made up for it.

Structured Optimal Brain Surgeon (ZipLM, Kurtic et al. 2023, arXiv:2302.04089), with costs measured
by what the whole model predicts, as Puzzle replaces one block at a time (Bercovich et al. 2024,
arXiv:2411.19146).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from surgery.calibration.case import Case
from surgery.calibration.divergence import Divergence, predicts
from surgery.calibration.output import pose_problem
from surgery.calibration.refusals import refuse_repeated, refuse_shared
from surgery.calibration.site_batches import SiteBatches
from surgery.calibration.stream import Weights, open_streams
from surgery.console import track_progress
from surgery.errors import ConfigError
from surgery.importance.choice import HeadCut, Heads, choose_heads
from surgery.importance.score_file import HeadScores
from surgery.importance.table import ESTIMATORS, GROUPS
from surgery.models.copies import make_sharing_copy
from surgery.models.sites import Site
from surgery.operations.prune_heads.compensation import Compensation
from surgery.operations.prune_heads.layer_heads import LayerHeads
from surgery.operations.prune_heads.options import ELIMINATION, PruneOptions
from surgery.operations.prune_heads.refit import refit_sites

# So many times as many units as still go are measured again: the others were dearer before, and
# have become no cheaper.
AGAIN = 3
# While heads are chosen, all positions count alike. Where sinks counted more, other heads were
# chosen, and SmolLM2 lost more with those gone.
ALIKE: Weights = ()


class Elimination(NamedTuple):
    """Which heads go.

    Attributes:
        removed: layer → query heads.
        costs: layer → cost of each KV group or query head when it was last measured, in nats per
            token.
    """

    removed: Heads
    costs: dict[int, list[float]]


@torch.no_grad()
def eliminate(operation: PruneOptions, sites: Sequence[Site], case: Case) -> Elimination:
    """Choose heads in rounds.

    In each round the cost of every unit (a KV group, or a query head) is the KL divergence from
    the original's predictions that it adds if it goes too and its layer's output projection is
    solved anew. In each layer they are put in order, each the cheapest after those before it, and
    the cost of the first 1, 2, … of them together is measured. The cheapest of all layers go, all
    layers that lost heads are refitted in order, and the next round measures in that model.

    Costs are measured on the first batches; what makes up for a unit is fitted to the rest.

    Raises:
        ConfigError: the model returns no logits, or that many heads cannot go.
        SiteError: a site shares its weights with another, or cannot be seen at work.
    """
    if not predicts(case.model, case.batches[0]):
        raise ConfigError(
            operation.get_key("estimator"),
            f"compares predictions, and a {type(case.model).__name__} returns no logits",
            given=ELIMINATION,
            valid=ESTIMATORS,
        )
    refuse_shared(case.model, sites)
    refuse_repeated(case.model, sites, case.batches[0])
    protected, cuts = operation.parse_protected(sites), _list_cuts(operation, sites)
    layers = [
        LayerHeads(
            site,
            by_group=operation.unit == GROUPS,
            protected=protected.get(site.layer, ()),
            empty=operation.remove_attention,
        )
        for site in sites
    ]

    def choose(cut: HeadCut) -> Heads:
        ranks = {layer.site.layer: layer.rank() for layer in layers}
        scores = HeadScores(groups=ranks) if cut.by_group else HeadScores(ranks)
        return choose_heads(sites, scores, cut, protected)

    work, measured = make_sharing_copy(case.model), False
    for number, cut in enumerate(cuts, 1):
        gone = sum(len(layer.removed) for layer in layers)
        more = sum(map(len, choose(cut).values())) - gone
        if not more:
            continue
        if gone:
            left = {layer.site.path: layer.list_left() for layer in layers}
            work = refit_sites(case.model, sites, left, case.batches, case.options, ALIKE).model
        compared = measured and cut.together and not cut.uniform
        again = _list_again(layers, more if compared else None)
        what = f"elimination, round {number} of {len(cuts)}"
        limit = _Limit(more, together=cut.together and not cut.uniform)
        _measure(work, layers, again, case, limit, what)
        measured = True
        found = choose(cut)
        for layer in layers:
            layer.removed = set(found[layer.site.layer])
    return Elimination(
        {layer.site.layer: sorted(layer.removed) for layer in layers},
        {layer.site.layer: layer.costs for layer in layers},
    )


def _list_cuts(operation: PruneOptions, sites: Sequence[Site]) -> list[HeadCut]:
    """List how much is gone after each round."""
    whole = operation.make_head_cut()
    if operation.uniform and len({site.q_heads for site in sites}) > 1:
        return [whole]  # not every amount can be uniform
    rounds = operation.rounds
    parts = []
    for number in range(1, rounds):
        amount = None if whole.amount is None else whole.amount * number / rounds
        count = None if whole.count is None else whole.count * number // rounds
        parts.append(replace(whole, amount=amount, count=count))
    return [*parts, whole]


def _list_again(layers: Sequence[LayerHeads], more: int | None) -> dict[int, list[int]]:
    """List the units of each layer that are measured; those with the lowest costs if `more`, which
    is how many heads still go in this round."""
    there = [
        (cost, layer.site.layer, unit, len(layer.units[unit]))
        for layer in layers
        for unit, cost in enumerate(layer.costs)
        if not layer.has_lost(unit)
    ]
    found: dict[int, list[int]] = {}
    seen = 0
    for _, number, unit, heads in sorted(there) if more is not None else there:
        if more is not None and seen >= AGAIN * more:
            break
        found.setdefault(number, []).append(unit)
        seen += heads
    return found


class _Limit:
    """What need not be measured, since other heads are cheaper.

    Attributes:
        heads: how many go in this round, and at most from one layer.

    Args:
        together: whether all layers are compared.
    """

    def __init__(self, heads: int, *, together: bool) -> None:
        self.heads, self._together = heads, together
        self._costs: list[float] = []

    def add(self, cost: float, heads: int) -> None:
        """Add what so many heads cost together, but without others."""
        self._costs += [cost / heads] * heads

    def is_above(self, cost: float) -> bool:
        """Tell whether enough heads are known to be cheaper than one of this cost."""
        if not self._together or len(self._costs) < self.heads:
            return False
        return cost > sorted(self._costs)[self.heads - 1]


def _measure(
    work: PreTrainedModel,
    layers: Sequence[LayerHeads],
    again: dict[int, list[int]],
    case: Case,
    limit: _Limit,
    what: str,
) -> None:
    """Measure units and orders of the layers in `work`, which is as it was in the end.

    Args:
        again: layer → units to measure alone.
    """
    sites = [layer.site for layer in layers]
    original, working = open_streams((case.model, work), sites, case.batches, ALIKE)
    divergence = Divergence(original, case.options.budget_batches)
    before = divergence.measure(working)
    total = sum(
        len(case.batches) + len(again[layer.site.layer]) + layer.count_moves(limit.heads)
        for layer in layers
        if layer.site.layer in again
    )
    with track_progress(what, total) as steps:
        for layer in layers:
            layer.forget_order()
            units = again.get(layer.site.layer, [])
            if not units:
                continue
            steps.describe(f"{what}, layer {layer.site.layer}")
            problem = pose_problem(SiteBatches(original, working, layer.site, 0), steps.advance)
            compensation = Compensation(work, layer.site, problem, case.options.ridge)
            for unit in units:
                with compensation.trying(layer.list_left({unit})):
                    layer.costs[unit] = divergence.measure(working) - before
                limit.add(layer.costs[unit], len(layer.units[unit]))
                steps.advance()
            surgeon = compensation.make_surgeon(layer.list_left())
            gone: set[int] = set()
            for move in layer.order_moves(surgeon, layer.count_moves(limit.heads)):
                steps.advance()
                least = min(layer.costs[unit] / len(layer.units[unit]) for unit in move)
                if gone and limit.is_above(least):
                    break
                gone.update(move)
                if gone <= set(units) and len(gone) == 1:
                    layer.add_move(move, layer.costs[move[0]])
                    continue
                with compensation.trying(layer.list_left(gone)):
                    layer.add_move(move, divergence.measure(working) - before)
