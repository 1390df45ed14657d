"""How heads attend in real text: the tap's statistics, and where their highest weights lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from surgery.lab.analysis.pattern import Pattern, pattern
from surgery.lab.analysis.watch import Batch, passes
from surgery.models.sites import Site
from surgery.observe import AttentionCall
from surgery.observe.head_sums import HeadSums
from surgery.observe.rows import sample_rows
from surgery.observe.statistics import (
    BLOCK_ROWS,
    MAXIMA,
    ROOTS,
    STATISTICS,
    compute_head_statistics,
)

# An offset counts where this share of the rows reaches so far; else few rows decide.
REACHED = 0.5


@dataclass(frozen=True)
class Behaviour:
    """One site.

    Attributes:
        statistics: of `surgery.observe.statistics`, a number per head; ``None`` where no row
            had it.
        shares: per head, of the rows that reach so far, how many have their highest weight at
            its best offset. Offsets that fewer than half of all rows reach are left out.
        offsets: which one that is.
        rows: query rows that were looked at.
    """

    statistics: dict[str, list[float | None]]
    shares: list[float]
    offsets: list[int]
    rows: int


class _Offsets:
    """Where highest weights lie, as sums over rows, by distance from the query."""

    def __init__(self, heads: int) -> None:
        self.rows = 0
        self._heads = heads
        self._most: dict[int, torch.Tensor] = {}
        # How often a row sees that far.
        self._seen: dict[int, float] = {}

    def add(self, seen: Pattern) -> None:
        self.rows += int(seen.weight.sum())
        highest = seen.keys.argmax(-1) - seen.rows
        offset = torch.arange(seen.keys.shape[-1], device=seen.rows.device) - seen.rows[:, None]
        least, count = int(offset.min()), int(offset.max() - offset.min()) + 1
        heads = highest.shape[1]
        lines = (highest - least) + count * torch.arange(heads, device=offset.device)[:, None]
        weight = seen.weight[:, None].expand_as(lines)
        most = torch.bincount(lines.flatten(), weight.flatten().double(), heads * count)
        reach = seen.visible * seen.weight[..., None]
        reached = torch.bincount(
            (offset - least).expand_as(reach).flatten(), reach.flatten().double(), count
        )
        for number, (found, there) in enumerate(
            zip(most.view(heads, count).T.cpu(), reached.tolist(), strict=True)
        ):
            if there:
                key = least + number
                self._most[key] = self._most.get(key, 0.0) + found
                self._seen[key] = self._seen.get(key, 0.0) + there

    def best(self) -> tuple[list[float], list[int]]:
        offsets = [k for k, there in self._seen.items() if there >= REACHED * self.rows]
        if not offsets:
            return [0.0] * self._heads, [0] * self._heads
        shares = torch.stack([self._most[k] / self._seen[k] for k in offsets])
        best = shares.max(0)
        return best.values.tolist(), [offsets[n] for n in best.indices.tolist()]


def observe_text(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    sites: Sequence[Site],
    rows: int | None,
    seed: int,
) -> dict[str, Behaviour]:
    """Site path → how its heads attend in `batches`, on `rows` query rows of each window.

    A site that took no part is left out.
    """
    sums = HeadSums(STATISTICS, MAXIMA, ROOTS)
    found: dict[str, _Offsets] = {}
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[int, torch.Tensor] = {}  # the same rows in every layer of a pass

    def seen(site: Site, call: AttentionCall) -> None:
        length = call.query.shape[2]
        if length not in drawn:
            drawn[length] = sample_rows(length, rows, generator)
        sums.add(site.path, compute_head_statistics(call, drawn[length]))
        offsets = found.setdefault(site.path, _Offsets(site.q_heads))
        for block in drawn[length].split(BLOCK_ROWS):
            offsets.add(pattern(call, block))

    for _ in passes(model, batches, sites, seen, "analysis, text"):
        drawn.clear()
    figures = sums.summarize()
    return {
        path: Behaviour(
            {name: _known(values) for name, values in figures[path].items()},
            *offsets.best(),
            offsets.rows,
        )
        for path, offsets in found.items()
    }


def _known(values: torch.Tensor) -> list[float | None]:
    return [value if value == value else None for value in values.tolist()]
