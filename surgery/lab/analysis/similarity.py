"""Compare heads: what they attend to, and what they add to the residual stream."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad
from transformers import PreTrainedModel

from surgery.data.collate import Batch
from surgery.errors import SurgeryError
from surgery.lab.analysis.watch import compute_pattern, run_passes
from surgery.models.sites import Site
from surgery.observe import AttentionCall
from surgery.observe.rows import sample_rows

# Numbers in memory at once while pairs are compared, and the most logarithms in total: with many
# heads, fewer rows are compared.
BLOCK = 4_000_000
WORK = 50_000_000_000


@dataclass(frozen=True)
class Similarity:
    """How similar the T heads of a model are, site after site.

    Attributes:
        heads: (layer, head) of each.
        divergence: [T, T] fp64, mean Jensen-Shannon divergence of attention rows in bits: 0 for
            equal rows, 1 for rows without a common key.
        gram: [T, T] fp64, mean inner product of what two heads add at a position (W_O,h o_h).
        rows: number of query rows that were compared.
    """

    heads: tuple[tuple[int, int], ...]
    divergence: torch.Tensor
    gram: torch.Tensor
    rows: int

    @property
    def cosine(self) -> torch.Tensor:
        """Cosines [T, T] of the heads' outputs over all rows; 0 for a head that adds nothing."""
        return compute_cosines(self.gram).clamp(-1, 1)


def compute_cosines(gram: torch.Tensor) -> torch.Tensor:
    """Scale inner products [T, T] to unit norms; 0 for heads of norm zero."""
    norms = gram.diagonal().clamp(min=0).sqrt()
    scale = torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))
    return gram * scale * scale[:, None]


def compare_heads(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    sites: Sequence[Site],
    rows: int | None,
    seed: int,
) -> Similarity:
    """Compare all pairs of heads, also across layers, on `rows` query rows of each window.

    Only these rows of one batch are kept at a time. With many heads (more than about 200), fewer
    rows are drawn, since the comparison would take hours.

    Raises:
        SurgeryError: not every layer attends once in a pass, over the same tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    columns = [_get_columns(model, site) for site in sites]
    total = sum(site.q_heads for site in sites)
    divergence = torch.zeros(total, total, dtype=torch.float64)
    gram = torch.zeros(total, total, dtype=torch.float64)
    windows = sum(len(batch["input_ids"]) for batch in batches)
    drawn: list[torch.Tensor] = []
    observed: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def observe(site: Site, call: AttentionCall) -> None:
        length = call.query.shape[2]
        if not drawn:
            most = max(1, WORK // (total * total * length * windows))
            drawn.append(sample_rows(length, min(rows or length, most), generator))
        pattern = compute_pattern(call, drawn[0])
        real = pattern.weight > 0
        outputs = (
            call.output.unflatten(-1, (site.q_heads, -1))
            if call.output.ndim == 3
            else (call.output)
        )
        outputs = outputs[:, pattern.rows]
        observed[site.path] = (pattern.p.movedim(1, 2)[real], outputs[real].float(), real)

    counted = 0
    for _ in run_passes(model, batches, sites, observe, "analysis, similarity"):
        if len(observed) < len(sites) or len({len(p) for p, _, _ in observed.values()}) > 1:
            raise SurgeryError(
                "heads cannot be compared: not every layer attends over the same tokens"
            )
        parts = [observed[site.path] for site in sites]
        widest = max(p.shape[-1] for p, _, _ in parts)
        p = torch.cat([pad(p, (0, widest - p.shape[-1])) for p, _, _ in parts], 1)
        divergence += sum_divergences(p).cpu()
        gram += _compute_gram([o for _, o, _ in parts], columns).cpu()
        counted += len(p)
        drawn.clear()
        observed.clear()
    heads = tuple((site.layer, head) for site in sites for head in range(site.q_heads))
    rows_seen = max(counted, 1)
    return Similarity(heads, divergence / rows_seen, gram / rows_seen, counted)


def sum_divergences(p: torch.Tensor) -> torch.Tensor:
    """Sum the Jensen-Shannon divergences of all pairs of heads over rows, in bits.

    JS(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2 (Lin 1991). Clark et al. 2019, section 6, compare
    heads with it.

    Args:
        p: [rows, T, S], distributions over S.

    Returns:
        [T, T], fp64.
    """
    rows, heads, keys = p.shape
    sums = torch.zeros(heads, heads, dtype=_choose_wide_dtype(p), device=p.device)
    own = -torch.special.xlogy(p, p).sum(-1)  # [rows, T]
    some = max(1, min(rows, BLOCK // (heads * keys) or 1))
    for start in range(0, rows, some):
        part, entropy = p[start : start + some], own[start : start + some]
        many = max(1, BLOCK // (len(part) * heads * keys))
        for first in range(0, heads, many):
            one = slice(first, min(first + many, heads))
            # Pairs with earlier heads are already done.
            middle = (part[:, one, None] + part[:, None, first:]) / 2
            mixed = -torch.special.xlogy(middle, middle).sum(-1)
            js = (mixed - (entropy[:, one, None] + entropy[:, None, first:]) / 2).clamp(min=0)
            sums[one, first:] += js.to(sums.dtype).sum(0)
    sums = sums.triu(1)
    return (sums + sums.T).to("cpu", torch.float64) / math.log(2)


def _compute_gram(outputs: Sequence[torch.Tensor], columns: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum inner products [T, T] of what heads add over rows; outputs are [rows, H, unit]."""
    total = sum(len(part) for part in columns)
    found = torch.zeros(
        total, total, dtype=_choose_wide_dtype(outputs[0]), device=outputs[0].device
    )
    some = max(1, BLOCK // (total * columns[0].shape[-1]))
    for start in range(0, len(outputs[0]), some):
        added = torch.cat(
            [
                torch.einsum("rhu,hud->hrd", part[start : start + some], weight)
                for part, weight in zip(outputs, columns, strict=True)
            ]
        ).flatten(1)
        found += (added @ added.T).to(found.dtype)
    return found.to("cpu", torch.float64)


def _get_columns(model: PreTrainedModel, site: Site) -> torch.Tensor:
    """Get each head's part of the output projection: [H, unit, D_model]."""
    weight = model.get_parameter(f"{site.output.path}.weight").detach().float()
    weight = weight if site.output.transposed else weight.mT
    return weight.unflatten(0, (-1, site.output.unit))


def _choose_wide_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64
