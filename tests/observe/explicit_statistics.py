"""The oracle of head statistics: each definition, row by row, read off an explicit map."""

from __future__ import annotations

import math
from collections import defaultdict

import torch

Figures = dict[str, tuple[torch.Tensor, torch.Tensor]]


def explicit_statistics(
    maps: torch.Tensor,
    real: torch.Tensor,
    ids: torch.Tensor | None = None,
    *,
    starts: torch.Tensor | None = None,
    cross: bool = False,
    sink: bool = False,
) -> Figures:
    """name → (sum, count) [H] over the real rows, of all that a map can say.

    Args:
        maps: [B, H, N, S], what eager attention returns; a key is seen where it is not 0.
        real: [B, N], queries that are no padding.
        ids: [B, S].
        starts: [B, S], where the text begins that a token is part of.
        sink: whether what a row lacks to 1 went to a sink.
    """
    batch, heads, queries, keys = maps.shape
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0] * heads)
    counts: dict[str, list[int]] = defaultdict(lambda: [0] * heads)
    everything = maps.double().tolist()
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                if not real[b, i]:
                    continue
                place = None if cross else i + keys - queries
                text = None if ids is None else ids[b].tolist()
                start = 0 if starts is None or place is None else int(starts[b, place])
                for name, value in _of_row(everything[b][h][i], place, text, start, sink).items():
                    sums[name][h] += value
                    counts[name][h] += 1
    return {name: (torch.tensor(sums[name]), torch.tensor(counts[name])) for name in sorted(sums)}


def _of_row(
    row: list[float], place: int | None, text: list[int] | None, start: int, sink: bool
) -> dict[str, float]:
    p = {j: share for j, share in enumerate(row) if share > 0}
    spare = [max(1 - sum(p.values()), 0.0)] if sink else []
    shares = [*p.values(), *spare]
    entropy = -sum(share * math.log(share) for share in shares if share > 0)
    values = {"attention_entropy": entropy}
    if len(shares) == 1:
        return values
    values |= {
        "normalized_entropy": entropy / math.log(len(shares)),
        "confidence": max(p.values()),
        "saturation": float(max(shares) > 0.99),
    }
    if place is None:
        return values | {"first_token": p[min(p)]}
    values["distance"] = sum(p[j] * abs(place - j) for j in p) / sum(p.values())
    columns = {"first_token": start, "previous_token": place - 1, "own_token": place}
    values |= {name: p[j] for name, j in columns.items() if j in p}
    if text is not None:
        same = [j for j in p if j < place and text[j] == text[place]]
        after = [j for j in p if start < j < place and text[j - 1] == text[place]]
        for name, found in (("same_token", same), ("induction", after)):
            if found:
                values[name] = sum(p[j] for j in found)
    return values
