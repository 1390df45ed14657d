"""`output_norm`: how much each head adds to the residual stream (Minitron)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from surgery.errors import SurgeryError
from surgery.importance.table import GROUPS, HEADS
from surgery.importance.work import Batch, BatchScores, Scores, Work, logits_of
from surgery.models.sites import Site


class OutputNorm:
    """||W_O,h o_h|| of each token, its mean over an example, root mean square over examples.

    Minitron (2407.14679, sec. 2.2) takes ||o_h||, with the mean over the sequence and L2 over the
    batch. Here o_h goes through its columns of the output projection first: values and output
    projection may trade any factor without changing the model, and a score should not follow it.
    L2 is taken as a root mean square, so that it does not grow with the batch. Padding does not
    count. A group's norm is that of its heads' sum.

    Scores are in units of the residual stream; the objective has no part in them.
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        self._grams = [
            {unit: gram(work.model, site, members(site, unit)) for unit in work.units}
            for site in work.sites
        ]

    @torch.no_grad()
    def __call__(self, batch: Batch) -> BatchScores:
        work = self.work
        found: list[list[dict[str, torch.Tensor]]] = [[] for _ in work.sites]
        handles = []

        def watch(number: int, site: Site) -> None:
            def took(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                inputs = args[0] if args else next(iter(kwargs.values()))
                found[number].append(self._means(number, site, inputs, batch))

            module = work.model.get_submodule(site.output.path)
            handles.append(module.register_forward_pre_hook(took, with_kwargs=True))

        for number, site in enumerate(work.sites):
            watch(number, site)
        try:
            logits_of(work.model, batch)
        finally:
            for handle in handles:
                handle.remove()
        scores: Scores = {unit: [] for unit in work.units}
        for site, calls in zip(work.sites, found, strict=True):
            if not calls:
                raise SurgeryError(
                    f"{site.path} took no part in a forward pass over these batches, or does not "
                    "call its output projection"
                )
            for unit in work.units:
                # Of a module that is called several times, the mean.
                means = torch.stack([call[unit] for call in calls]).mean(0)
                scores[unit].append(means.square().mean(0).sqrt())
        examples = next(iter(batch.values()))
        mask = batch.get("attention_mask", batch.get("input_ids", examples))
        tokens = int(mask.sum()) if "attention_mask" in batch else mask.numel()
        return BatchScores(scores, len(examples), tokens)

    def _means(
        self, number: int, site: Site, inputs: torch.Tensor, batch: Batch
    ) -> dict[str, torch.Tensor]:
        """Unit → [B, units], fp64: the norm's mean over real tokens."""
        rows = len(next(iter(batch.values())))
        outputs = inputs.detach().reshape(rows, -1, site.q_heads * site.output.unit)
        real = real_tokens(self.work, site, batch, outputs)
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


def members(site: Site, unit: str) -> int:
    """Heads that are scored together."""
    return {HEADS: 1, GROUPS: site.group_size}[unit]


def gram(model: torch.nn.Module, site: Site, together: int) -> torch.Tensor:
    """[Hq / together, width, width] of W_O,h^T W_O,h, width = together * unit."""
    weight = model.get_parameter(f"{site.output.path}.weight").detach()
    weight = weight if site.output.transposed else weight.mT  # [in, out]
    columns = weight.float().unflatten(0, (-1, together * site.output.unit))
    return columns @ columns.mT


def real_tokens(work: Work, site: Site, batch: Batch, outputs: torch.Tensor) -> torch.Tensor:
    """[B, N] of 0 and 1 in fp64: which queries are no padding."""
    decoder = bool(work.model.config.is_encoder_decoder) and (site.cached or site.cross)
    mask = batch.get("decoder_attention_mask" if decoder else "attention_mask")
    shape: Sequence[int] = outputs.shape[:2]
    if mask is None or tuple(mask.shape) != tuple(shape):
        return torch.ones(*shape, dtype=torch.float64)
    return mask.cpu().double()
