"""`output_norm`: the norm of what each head adds to the residual stream (Minitron)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from surgery.data.collate import Batch
from surgery.errors import SurgeryError
from surgery.importance.table import GROUPS, HEADS
from surgery.importance.work import BatchScores, Scores, Work, run_batch
from surgery.models.editable import is_plain
from surgery.models.forward import find_device
from surgery.models.sites import Site


class OutputNorm:
    """||W_O,h o_h|| of each token; its mean over an example, root mean square over examples.

    Minitron (2407.14679, sec. 2.2) takes ||o_h||, with the mean over the sequence and L2 over the
    batch. Here o_h is first multiplied with its columns of the output projection: a factor can
    move between values and output projection without changing the model, and the score must not
    depend on it. L2 is taken as a root mean square, so that it does not grow with the batch.
    Padding does not count. The norm of a group is the norm of the sum of its heads.

    Scores are in units of the residual stream; the objective does not matter.
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        self._grams = [
            {unit: compute_gram(work.model, site, count_members(site, unit)) for unit in work.units}
            for site in work.sites
        ]

    @torch.no_grad()
    def __call__(self, batch: Batch) -> BatchScores:
        work = self.work
        calls_by_site: list[list[dict[str, torch.Tensor]]] = [[] for _ in work.sites]
        handles = []

        def watch(number: int, site: Site) -> None:
            def keep_norms(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                inputs = args[0] if args else next(iter(kwargs.values()))
                calls_by_site[number].append(self._average_norms(number, site, inputs, batch))

            module = work.model.get_submodule(site.output.path)
            handles.append(module.register_forward_pre_hook(keep_norms, with_kwargs=True))

        for number, site in enumerate(work.sites):
            watch(number, site)
        try:
            run_batch(work.model, batch)
        finally:
            for handle in handles:
                handle.remove()
        scores: Scores = {unit: [] for unit in work.units}
        for site, calls in zip(work.sites, calls_by_site, strict=True):
            if not calls:
                raise SurgeryError(
                    f"{site.path} took no part in a forward pass over these batches, or does not "
                    "call its output projection"
                )
            for unit in work.units:
                # If a module is called several times, take the mean.
                means = torch.stack([call[unit] for call in calls]).mean(0)
                scores[unit].append(means.square().mean(0).sqrt())
        examples = next(iter(batch.values()))
        mask = batch.get("attention_mask")
        words = batch.get("input_ids")
        count = len(examples) if words is None else words.numel()  # an image counts as one
        tokens = count if mask is None else int(mask.sum())
        return BatchScores(scores, len(examples), tokens)

    def _average_norms(
        self, number: int, site: Site, inputs: torch.Tensor, batch: Batch
    ) -> dict[str, torch.Tensor]:
        """Average the norms over real tokens: unit → [B, units], fp64."""
        rows = len(next(iter(batch.values())))
        outputs = inputs.detach().reshape(rows, -1, site.q_heads * site.output.unit)
        real = mark_real_tokens(self.work, site, batch, outputs)
        means = {}
        for unit in self.work.units:
            gram = self._grams[number][unit].to(outputs.dtype)
            heads = outputs.unflatten(-1, (len(gram), -1)).movedim(2, 0)  # [units, B, N, width]
            squares = (
                (heads.flatten(1, 2) @ gram).unflatten(1, heads.shape[1:3]).mul_(heads).sum(-1)
            )
            norms = squares.cpu().double().clamp_(min=0).sqrt_()  # [units, B, N]
            means[unit] = ((norms * real).sum(-1) / real.sum(-1).clamp(min=1)).T
        return means


def count_members(site: Site, unit: str) -> int:
    """Count the heads that are scored together."""
    return {HEADS: 1, GROUPS: site.group_size}[unit]


def compute_gram(model: PreTrainedModel, site: Site, together: int) -> torch.Tensor:
    """Compute W_O,h^T W_O,h: [Hq / together, width, width], width = together * unit."""
    columns = _read_weight(model, site).float().unflatten(0, (-1, together * site.output.unit))
    return columns @ columns.mT


@torch.no_grad()
def _read_weight(model: PreTrainedModel, site: Site) -> torch.Tensor:
    """Read W_O: [in, out]. A projection that computes its weight is asked with a unit matrix."""
    module: Any = model.get_submodule(site.output.path)
    if is_plain(module) and not module.weight.is_meta:
        return module.weight if site.output.transposed else module.weight.mT
    units = torch.eye(site.output.in_features, device=find_device(model), dtype=model.dtype)
    outputs: torch.Tensor = module(units) - module(torch.zeros_like(units[:1]))
    return outputs


def mark_real_tokens(work: Work, site: Site, batch: Batch, outputs: torch.Tensor) -> torch.Tensor:
    """Mark the queries that are not padding: [B, N] of 0 and 1, fp64."""
    decoder = bool(work.model.config.is_encoder_decoder) and (site.cached or site.cross)
    mask = batch.get("decoder_attention_mask" if decoder else "attention_mask")
    shape: Sequence[int] = outputs.shape[:2]
    if mask is None or tuple(mask.shape) != tuple(shape):
        return torch.ones(*shape, dtype=torch.float64)
    return mask.cpu().double()
