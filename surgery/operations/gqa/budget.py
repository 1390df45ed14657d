"""How many KV heads each layer gets out of a budget: where fewer of them hurt least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from surgery.calibration.case import Calibration
from surgery.calibration.divergence import Divergence, predicts
from surgery.calibration.rows import put_parameter
from surgery.calibration.stream import open_streams
from surgery.data.collate import Batch
from surgery.errors import ConfigError
from surgery.models.copies import make_sharing_copy
from surgery.models.sites import Site
from surgery.operations.gqa.layerwise import calibrate_site
from surgery.operations.gqa.options import GQAOptions, list_divisors


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
    of the model's predictions from the original's is taken over a few batches. Costs of layers are
    taken to add up; the cheapest counts within the budget are found exactly.

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
    some = batches[: options.budget_batches]
    quick = replace(options, refine_steps=0)
    original, working = open_streams((model, make_sharing_copy(model)), sites, some)
    divergence = Divergence(original, len(some))
    costs: list[dict[int, float]] = []
    for site in sites:
        block = working.model.get_submodule(site.block)
        before = dict(block.named_parameters())
        found = {site.kv_heads: 0.0}
        for count in list_divisors(site.kv_heads)[:-1]:
            plain = replace(operation, kv_heads=count)
            calibrate_site(original, working, site, count, plain, quick, lambda _: None)
            found[count] = divergence.measure(working)
            for name, parameter in before.items():
                put_parameter(block, name, parameter)
            advance(f"layer {site.layer} with {count} KV heads: KL {found[count]:.4f}")
        costs.append(found)
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
