"""How many KV heads each layer gets out of a budget: where fewer of them hurt least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from surgery.calibration.case import Calibration
from surgery.calibration.rows import put_parameter
from surgery.calibration.stream import Stream, open_streams
from surgery.data.collate import Batch
from surgery.errors import ConfigError
from surgery.models.copies import make_sharing_copy
from surgery.models.packed import make_inputs
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
    _check_logits(model, operation, batches[0])
    some = batches[: options.budget_batches]
    quick = replace(options, refine_steps=0)
    original, working = open_streams((model, make_sharing_copy(model)), sites, some)
    costs: list[dict[int, float]] = []
    for site in sites:
        block = working.model.get_submodule(site.block)
        before = dict(block.named_parameters())
        found = {site.kv_heads: 0.0}
        for count in list_divisors(site.kv_heads)[:-1]:
            plain = replace(operation, kv_heads=count)
            calibrate_site(original, working, site, count, plain, quick, lambda _: None)
            found[count] = compute_divergence(original, working)
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


@torch.no_grad()
def compute_divergence(original: Stream, changed: Stream) -> float:
    """Compute mean KL(original || changed) in nats over the real positions of the batches.

    Both start at the layer to which their batches have come.
    """
    total, count = 0.0, 0
    for number in range(len(original.batches)):
        logits = []
        for stream in (original, changed):
            with stream.resume(number) as batch:
                inputs = _get_inputs(batch, next(stream.model.parameters()).device)
                logits.append(stream.model(**make_inputs(stream.model, inputs)).logits)
        log_p, log_q = (F.log_softmax(one.float(), dim=-1) for one in logits)
        kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        mask = inputs.get(
            "decoder_attention_mask"
            if original.model.config.is_encoder_decoder
            else "attention_mask"
        )
        if mask is not None and mask.shape == kl.shape:
            kl = kl[mask.bool()]
        total += float(kl.sum())
        count += kl.numel()
    return total / max(1, count)


@torch.no_grad()
def _check_logits(model: PreTrainedModel, operation: GQAOptions, batch: Batch) -> None:
    inputs = _get_inputs(batch, next(model.parameters()).device)
    if not hasattr(model(**make_inputs(model, inputs)), "logits"):
        raise ConfigError(
            operation.get_key("kv_heads"),
            f"a {type(model).__name__} returns no logits, and a budget compares layers by them",
            valid="a number, or one per layer",
        )


def _get_inputs(batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in batch.items() if name != "labels"}
