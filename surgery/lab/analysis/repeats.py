"""Induction and duplicate-token heads, on random tokens said twice (arXiv:2209.11895)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from surgery.errors import ConfigError
from surgery.lab.analysis.pattern import pattern
from surgery.lab.analysis.watch import Batch, passes
from surgery.models.sites import Site
from surgery.observe import AttentionCall


@dataclass(frozen=True)
class Repeats:
    """Sequences `before`, then `length` random tokens, then the same again, then `after`.

    Attributes:
        batches: ``input_ids`` [B, before + 2 length + after].
        before: tokens that come first.
        length: tokens that are repeated.
    """

    batches: tuple[Batch, ...]
    before: int
    length: int


def random_repeats(
    vocabulary: torch.Tensor,
    count: int,
    length: int,
    batch_size: int,
    seed: int,
    frame: tuple[Sequence[int], Sequence[int]] = ((), ()),
) -> Repeats:
    """`count` sequences whose tokens are drawn evenly from `vocabulary` [V].

    Within a sequence no token is drawn twice, so each has one earlier self alone; where the
    vocabulary is smaller than `length`, sequences become as short as it is.

    Args:
        frame: special tokens before and after, as the tokenizer adds them.

    Raises:
        ConfigError: fewer than two tokens to draw from.
    """
    vocabulary = vocabulary.unique()
    length = min(length, len(vocabulary))
    if length < 2:
        raise ConfigError(
            "analysis.repeat_length", "there are not two tokens to repeat", given=length
        )
    generator = torch.Generator().manual_seed(seed)
    before, after = (torch.tensor(list(part), dtype=torch.long) for part in frame)
    made = []
    for _ in range(count):
        half = vocabulary[torch.randperm(len(vocabulary), generator=generator)[:length]]
        made.append(torch.cat([before, half, half, after]))
    batches = [{"input_ids": part} for part in torch.stack(made).split(batch_size)]
    return Repeats(tuple(batches), len(before), length)


def observe_repeats(
    model: PreTrainedModel, repeats: Repeats, sites: Sequence[Site]
) -> dict[str, dict[str, list[float | None]]]:
    """Site path → induction and duplicate_token: mean attention per head, over the second half.

    induction: to the token after the same token in the first half, the prefix-matching score of
    Olsson et al. 2022. duplicate_token: to that same token itself (Wang et al. 2022,
    arXiv:2211.00593). ``None``: the layer does not see so far back.
    """
    start, length = repeats.before, repeats.length
    rows = torch.arange(start + length, start + 2 * length)
    targets = {"induction": rows - length + 1, "duplicate_token": rows - length}
    sums: dict[str, dict[str, torch.Tensor]] = {}
    counts: dict[str, dict[str, float]] = {}

    def seen(site: Site, call: AttentionCall) -> None:
        found = pattern(call, rows)
        for name, target in targets.items():
            at = target.to(found.p.device)[None, None, :, None]
            mass = found.keys.gather(-1, at.expand(*found.p.shape[:3], 1)).squeeze(-1)
            reached = found.visible.gather(-1, at[0].expand(*found.visible.shape[:2], 1))
            weight = reached.squeeze(-1) * found.weight  # [B, R]
            total = (mass * weight[:, None]).sum((0, 2)).double().cpu()
            mine, count = sums.setdefault(site.path, {}), counts.setdefault(site.path, {})
            mine[name] = mine.get(name, 0.0) + total
            count[name] = count.get(name, 0.0) + float(weight.sum())

    for _ in passes(model, repeats.batches, sites, seen, "analysis, repeats"):
        pass
    return {
        path: {
            name: [x / counts[path][name] if counts[path][name] else None for x in total.tolist()]
            for name, total in mine.items()
        }
        for path, mine in sums.items()
    }
