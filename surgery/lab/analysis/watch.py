"""Run a model over batches and observe its attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from surgery.console import track_progress
from surgery.data.collate import Batch
from surgery.errors import ConfigError, TapError
from surgery.importance.estimate import freezing
from surgery.models.packed import make_inputs
from surgery.models.sites import Site, find_sites
from surgery.observe import AttentionCall, Tap
from surgery.observe.rows import compute_row_logits, weigh_rows

SiteObserver = Callable[[Site, AttentionCall], None]


def find_self_attention(model: PreTrainedModel) -> list[Site]:
    """Find the sites whose heads can be analysed.

    Raises:
        ConfigError: the model is an encoder-decoder, or has less than two such heads.
    """
    kind = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ConfigError(
            "stages", "`analyze` needs a model with one stack, a decoder or an encoder", given=kind
        )
    sites = [site for site in find_sites(model).sites if not site.cross]
    if not sites:
        raise ConfigError("model", "has no attention heads that can be analysed", given=kind)
    if sum(site.q_heads for site in sites) < 2:
        raise ConfigError(
            "model", "has only one head, so there is nothing to compare it with", given=kind
        )
    return sites


def run_passes(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    sites: Sequence[Site],
    observe: SiteObserver,
    what: str,
) -> Iterator[Batch]:
    """Run `model` over every batch, call `observe` at each site, and yield each batch.

    If a site attends several times in a pass (layers that share one block), only the first time
    counts.

    Args:
        batches: arguments of forward passes; the model does not get the labels.
        what: title of the progress bar.

    Raises:
        TapError: none of the sites was observed.
    """
    by_path = {site.path: site for site in sites}
    observed: set[str] = set()

    def observe_first(call: AttentionCall) -> None:
        site = by_path.get(call.site)
        if site is not None and call.site not in observed:
            observed.add(call.site)
            observe(site, call)

    tap = Tap(model, observe_first)
    device = next(model.parameters()).device
    with freezing(model), torch.no_grad(), track_progress(what, len(batches)) as steps:
        for arguments in batches:
            batch = {k: v.to(device) for k, v in arguments.items() if k != "labels"}
            inputs = make_inputs(model, batch)
            observed.clear()
            tap.open(batch.get("attention_mask"), tokens=batch.get("input_ids"))
            try:
                model(**inputs)
            finally:
                tap.close()
            if not observed:
                raise TapError(
                    f"the heads of {tap.model_class} cannot be observed: its attention does not "
                    "use transformers' AttentionInterface"
                )
            yield batch
            steps.advance()


def unmask(batch: Batch) -> dict[str, torch.Tensor]:
    """Restore the text of a batch for masked_lm, whose labels hold the masked tokens."""
    labels, ids = batch.get("labels"), batch["input_ids"]
    kept = {name: value for name, value in batch.items() if name != "labels"}
    if labels is not None and labels.shape == ids.shape:
        kept["input_ids"] = torch.where(labels == -100, ids, labels)
    return kept


@dataclass(frozen=True)
class Pattern:
    """Some query rows of one call.

    Attributes:
        rows: [R], the queries.
        logits: [B, H, R, S], masked entries -inf; with attention sinks, S includes their column.
        p: [B, H, R, S], softmax over S; zeros where a row sees nothing.
        visible: [B, R, S'], which keys a row sees; S' does not include the column of sinks.
        weight: [B, R], 1 for rows that count: real queries that see at least two keys.
    """

    rows: torch.Tensor
    logits: torch.Tensor
    p: torch.Tensor
    visible: torch.Tensor
    weight: torch.Tensor

    @property
    def keys(self) -> torch.Tensor:
        """`p` without the column of sinks: [B, H, R, S']."""
        return self.p[..., : self.visible.shape[-1]]


def compute_pattern(call: AttentionCall, rows: torch.Tensor) -> Pattern:
    """Compute the pattern of query rows `rows` [R] of a call, exact and in fp32."""
    logits = compute_row_logits(call, rows)
    keys = call.key.shape[2]
    # All heads of a site see the same keys; no model has a bias of -inf for only one head.
    visible = logits[:, 0, :, :keys] != float("-inf")
    p = torch.softmax(logits, dim=-1).nan_to_num(0.0)
    weight = weigh_rows(call, rows) * (visible.sum(-1) > 1)
    return Pattern(rows.to(logits.device), logits, p, visible, weight)
