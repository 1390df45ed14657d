"""Passes of a model over batches, its attention looked at as it goes by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from transformers import PreTrainedModel

from surgery.console import track_progress
from surgery.errors import ConfigError, TapError
from surgery.importance.estimate import freezing
from surgery.models.forward import get_forward_options
from surgery.models.sites import Site, find_sites
from surgery.observe import AttentionCall, Tap

Batch = Mapping[str, torch.Tensor]
Seen = Callable[[Site, AttentionCall], None]


def self_attention(model: PreTrainedModel) -> list[Site]:
    """The sites whose heads can be analysed.

    Raises:
        ConfigError: an encoder-decoder, or a model with less than two such heads.
    """
    kind = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ConfigError(
            "stages", "`analyze` is for models of one stack, a decoder or an encoder", given=kind
        )
    sites = [site for site in find_sites(model).sites if not site.cross]
    if not sites:
        raise ConfigError("model", "has no attention whose heads could be analysed", given=kind)
    if sum(site.q_heads for site in sites) < 2:
        raise ConfigError(
            "model", "has a single head, which nothing can be compared with", given=kind
        )
    return sites


def passes(
    model: PreTrainedModel, batches: Sequence[Batch], sites: Sequence[Site], seen: Seen, what: str
) -> Iterator[Batch]:
    """Run `model` over every batch; `seen` is called at each site, and each batch given back.

    Of a site that attends several times in a pass (layers that share one block), the first is seen.

    Args:
        batches: arguments of forward passes; labels are not handed over.
        what: for the progress bar.

    Raises:
        TapError: none of the sites came by.
    """
    by_path = {site.path: site for site in sites}
    met: set[str] = set()

    def observer(call: AttentionCall) -> None:
        site = by_path.get(call.site)
        if site is not None and call.site not in met:
            met.add(call.site)
            seen(site, call)

    tap = Tap(model, observer)
    device = next(model.parameters()).device
    with freezing(model), torch.no_grad(), track_progress(what, len(batches)) as steps:
        for given in batches:
            batch = {k: v.to(device) for k, v in given.items() if k != "labels"}
            met.clear()
            tap.open(batch.get("attention_mask"), tokens=batch.get("input_ids"))
            try:
                model(**batch, **get_forward_options(model))
            finally:
                tap.close()
            if not met:
                raise TapError(
                    f"the heads of {tap.model_class} cannot be looked at: its attention does not "
                    "go through transformers' AttentionInterface"
                )
            yield batch
            steps.advance()


def unmasked(batch: Batch) -> dict[str, torch.Tensor]:
    """A batch for masked_lm with its text put back: what is masked out stands in the labels."""
    labels, ids = batch.get("labels"), batch["input_ids"]
    kept = {name: value for name, value in batch.items() if name != "labels"}
    if labels is not None and labels.shape == ids.shape:
        kept["input_ids"] = torch.where(labels == -100, ids, labels)
    return kept
