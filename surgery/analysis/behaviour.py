"""How heads attend in real text: sums over sampled rows, one line per head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from surgery.analysis.pattern import Pattern, pattern
from surgery.analysis.watch import Batch, passes
from surgery.anatomy import Site
from surgery.observation import AttentionCall
from surgery.observation.entropy import row_entropy
from surgery.observation.rows import sample_rows

# Means over rows, weighted by whether the row has such a key at all.
STATISTICS = (
    "attention_entropy", "normalized_entropy", "confidence", "first_token", "previous_token",
    "own_token", "distance",
)  # fmt: skip
# An offset counts where this share of the rows reaches so far; else few rows decide.
REACHED = 0.5


class Behaviour:
    """Running sums for one site.

    Attributes:
        rows: query rows that were looked at.
    """

    def __init__(self, heads: int) -> None:
        self.rows = 0
        self._sums = {name: torch.zeros(heads, dtype=torch.float64) for name in STATISTICS}
        self._weights = dict.fromkeys(STATISTICS, 0.0)
        # Keyed by distance from the query: how often a head's highest weight lies there, and how
        # often the row sees that far.
        self._most: dict[int, torch.Tensor] = {}
        self._seen: dict[int, float] = {}

    def add(self, seen: Pattern) -> None:
        weight, p = seen.weight, seen.keys
        index = torch.arange(p.shape[-1], device=p.device)
        offset = index - seen.rows[:, None]  # [R, S]
        entropy, normalized, _ = row_entropy(seen.logits)
        self._mean("attention_entropy", entropy, weight)
        self._mean("normalized_entropy", normalized, weight)
        self._mean("confidence", p.amax(-1), weight)
        self._mean("distance", (p * offset.abs()).sum(-1), weight)
        for name, where in (
            ("first_token", (index == 0).expand_as(offset)),
            ("previous_token", offset == -1),
            ("own_token", offset == 0),
        ):
            # The first token is no sink for its own row, which sees nothing else.
            self._mean(name, (p * where).sum(-1), weight * (seen.visible & where).any(-1))
        self._offsets(p.argmax(-1) - seen.rows, offset, seen)
        self.rows += int(weight.sum())

    def _mean(self, name: str, values: torch.Tensor, weight: torch.Tensor) -> None:
        """Add values [B, H, R] with weights [B, R]."""
        self._sums[name] += (values * weight[:, None]).sum((0, 2)).double().cpu()
        self._weights[name] += float(weight.sum())

    def _offsets(self, highest: torch.Tensor, offset: torch.Tensor, seen: Pattern) -> None:
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

    def means(self) -> dict[str, list[float | None]]:
        """Statistic → one number per head; ``None`` where no row had it."""
        return {
            name: [x if self._weights[name] else None for x in (sums / self._total(name)).tolist()]
            for name, sums in self._sums.items()
        }

    def _total(self, name: str) -> float:
        return self._weights[name] or 1.0

    def positions(self) -> tuple[list[float], list[int]]:
        """Per head: the share of rows whose highest weight lies at its best offset, and which.

        Of the rows that reach so far. Offsets that fewer than half of all rows reach are left out.
        """
        offsets = [k for k, there in self._seen.items() if there >= REACHED * self.rows]
        if not offsets:
            return [0.0] * len(self._sums["distance"]), [0] * len(self._sums["distance"])
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
    found: dict[str, Behaviour] = {}
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[int, torch.Tensor] = {}  # the same rows in every layer of a pass

    def seen(site: Site, call: AttentionCall) -> None:
        length = call.query.shape[2]
        if length not in drawn:
            drawn[length] = sample_rows(length, rows, generator)
        found.setdefault(site.path, Behaviour(site.q_heads)).add(pattern(call, drawn[length]))

    for _ in passes(model, batches, sites, seen, "analysis, text"):
        drawn.clear()
    return found
