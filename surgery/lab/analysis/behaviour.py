"""Observe how heads attend in real text: statistics, and the offsets of their highest weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from surgery.data.collate import Batch
from surgery.lab.analysis.watch import Pattern, compute_pattern, run_passes
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

# An offset counts if at least this fraction of the rows reaches it; else a few rows would decide.
REACHED = 0.5


@dataclass(frozen=True)
class Behaviour:
    """How the heads of one site attend.

    Attributes:
        statistics: name of `surgery.observe.statistics` → a number per head; ``None`` where no row
            counts.
        shares: per head, the fraction of rows with their highest weight at the head's best offset,
            of the rows that reach this offset. Offsets that fewer than half of all rows reach are
            left out.
        offsets: the best offset of each head.
        rows: number of query rows.
    """

    statistics: dict[str, list[float | None]]
    shares: list[float]
    offsets: list[int]
    rows: int


class _Offsets:
    """Counts the rows whose highest weight lies at each distance from the query."""

    def __init__(self, heads: int) -> None:
        self.rows = 0
        self._heads = heads
        self._most: dict[int, torch.Tensor] = {}
        # How many rows see a key at this offset.
        self._seen: dict[int, float] = {}

    def add(self, pattern: Pattern) -> None:
        self.rows += int(pattern.weight.sum())
        highest = pattern.keys.argmax(-1) - pattern.rows
        keys = torch.arange(pattern.keys.shape[-1], device=pattern.rows.device)
        offset = keys - pattern.rows[:, None]
        least, count = int(offset.min()), int(offset.max() - offset.min()) + 1
        heads = highest.shape[1]
        lines = (highest - least) + count * torch.arange(heads, device=offset.device)[:, None]
        weight = pattern.weight[:, None].expand_as(lines)
        most = torch.bincount(lines.flatten(), weight.flatten().double(), heads * count)
        reach = pattern.visible * pattern.weight[..., None]
        reached = torch.bincount(
            (offset - least).expand_as(reach).flatten(), reach.flatten().double(), count
        )
        for number, (hits, rows) in enumerate(
            zip(most.view(heads, count).T.cpu(), reached.tolist(), strict=True)
        ):
            if rows:
                key = least + number
                self._most[key] = self._most.get(key, 0.0) + hits
                self._seen[key] = self._seen.get(key, 0.0) + rows

    def find_best(self) -> tuple[list[float], list[int]]:
        offsets = [k for k, rows in self._seen.items() if rows >= REACHED * self.rows]
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
    """Observe how heads attend in `batches`, on `rows` query rows of each window.

    Returns:
        Site path → behaviour; sites that were not used are left out.
    """
    sums = HeadSums(STATISTICS, MAXIMA, ROOTS)
    offsets_by_site: dict[str, _Offsets] = {}
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[int, torch.Tensor] = {}  # length → rows, the same in every layer of a pass

    def observe(site: Site, call: AttentionCall) -> None:
        length = call.query.shape[2]
        if length not in drawn:
            drawn[length] = sample_rows(length, rows, generator)
        sums.add(site.path, compute_head_statistics(call, drawn[length]))
        offsets = offsets_by_site.setdefault(site.path, _Offsets(site.q_heads))
        for block in drawn[length].split(BLOCK_ROWS):
            offsets.add(compute_pattern(call, block))

    for _ in run_passes(model, batches, sites, observe, "analysis, text"):
        drawn.clear()
    figures = sums.summarize()
    return {
        path: Behaviour(
            {name: _to_numbers(values) for name, values in figures[path].items()},
            *offsets.find_best(),
            offsets.rows,
        )
        for path, offsets in offsets_by_site.items()
    }


def _to_numbers(values: torch.Tensor) -> list[float | None]:
    return [value if value == value else None for value in values.tolist()]
