"""How many KV heads each layer gets out of a budget: where fewer of them hurt least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from surgery.calibration.case import Calibration
from surgery.calibration.divergence import predicts
from surgery.calibration.layer_choices import UNCHANGED, Walker
from surgery.data.collate import Batch
from surgery.errors import ConfigError
from surgery.models.sites import Site
from surgery.operations.gqa.choices import list_counts
from surgery.operations.gqa.options import GQAOptions


def choose_counts(
    model: PreTrainedModel,
    sites: Sequence[Site],
    operation: GQAOptions,
    batches: Sequence[Batch],
    options: Calibration,
    advance: Callable[[str], None],
) -> GQAOptions:
    """Make the operation with a count per layer in place of its average.

    The cost of a count at a layer is measured: that layer alone is merged, and the KL divergence
    of the model's predictions from the original's is taken over a few batches that the merge is not
    fitted to. Costs of layers are taken to add up; the cheapest counts within the budget are found
    exactly.

    Raises:
        ConfigError: the model returns no logits.
    """
    assert operation.average is not None
    if not predicts(model, batches[0]):
        raise ConfigError(
            operation.get_key("kv_heads"),
            f"a {type(model).__name__} returns no logits, and a budget compares layers by them",
            valid="a number, or one per layer",
        )
    offered = [{choice.key for choice in list_counts(operation, site)} for site in sites]
    compared = min(options.budget_batches, max(1, len(batches) // 2))
    walker = Walker(model, sites, [operation], offered, batches, options, compared)
    walk = walker.score(
        [UNCHANGED] * len(sites), lambda site, name: advance(f"layer {site.layer}, {name}")
    )
    costs = [
        {site.kv_heads: 0.0, **{found[key].given: losses[key] for key in found}}
        for site, found, losses in zip(sites, walk.choices, walk.losses, strict=True)
    ]
    total = int(operation.average * len(sites) + 1e-9)
    return replace(operation, kv_heads=find_cheapest(costs, total))


def find_cheapest(costs: Sequence[dict[int, float]], total: int) -> list[int]:
    """Find one count per layer, with sum at most `total` and the least sum of costs (exact).

    Args:
        costs: per layer, count → cost.
    """
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for options in costs:
        grown: dict[int, tuple[float, list[int]]] = {}
        for spent, (cost, chosen) in best.items():
            for count, more in options.items():
                at = spent + count
                if at <= total and (at not in grown or cost + more < grown[at][0]):
                    grown[at] = cost + more, [*chosen, count]
        best = grown
    return min(best.values(), key=lambda found: (found[0], sum(found[1])))[1]
