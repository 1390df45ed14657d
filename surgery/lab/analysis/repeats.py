"""Find induction and duplicate-token heads with repeated random tokens (arXiv:2209.11895)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from surgery.data.collate import Batch
from surgery.errors import ConfigError
from surgery.lab.analysis.watch import compute_pattern, run_passes
from surgery.models.sites import Site
from surgery.observe import AttentionCall


@dataclass(frozen=True)
class Repeats:
    """Sequences of special tokens, `length` random tokens, the same tokens again, special tokens.

    Attributes:
        batches: ``input_ids`` [B, before + 2 length + after].
        before: number of special tokens at the start.
        length: number of tokens that are repeated.
    """

    batches: tuple[Batch, ...]
    before: int
    length: int


def draw_repeats(
    vocabulary: torch.Tensor,
    count: int,
    length: int,
    batch_size: int,
    seed: int,
    frame: tuple[Sequence[int], Sequence[int]] = ((), ()),
) -> Repeats:
    """Draw `count` sequences whose tokens come evenly from `vocabulary` [V].

    No token is drawn twice for a sequence, so each repeated token has exactly one earlier copy. If
    the vocabulary is smaller than `length`, the sequences are as short as the vocabulary.

    Args:
        frame: special tokens before and after, as the tokenizer adds them.

    Raises:
        ConfigError: there are fewer than two tokens to draw from.
    """
    vocabulary = vocabulary.unique()
    length = min(length, len(vocabulary))
    if length < 2:
        raise ConfigError(
            "analysis.repeat_length", "there must be at least two tokens to repeat", given=length
        )
    generator = torch.Generator().manual_seed(seed)
    before, after = (torch.tensor(list(part), dtype=torch.long) for part in frame)
    sequences = []
    for _ in range(count):
        half = vocabulary[torch.randperm(len(vocabulary), generator=generator)[:length]]
        sequences.append(torch.cat([before, half, half, after]))
    batches = [{"input_ids": part} for part in torch.stack(sequences).split(batch_size)]
    return Repeats(tuple(batches), len(before), length)


def observe_repeats(
    model: PreTrainedModel, repeats: Repeats, sites: Sequence[Site]
) -> dict[str, dict[str, list[float | None]]]:
    """Measure the mean attention of the second half to tokens of the first half, per head.

    induction: attention to the token after the same token, the prefix-matching score of Olsson et
    al. 2022. duplicate_token: attention to the same token (Wang et al. 2022, arXiv:2211.00593).

    Returns:
        Site path → ``induction`` and ``duplicate_token`` → a number per head; ``None`` if the layer
        does not see that far back.
    """
    start, length = repeats.before, repeats.length
    rows = torch.arange(start + length, start + 2 * length)
    targets = {"induction": rows - length + 1, "duplicate_token": rows - length}
    sums: dict[str, dict[str, torch.Tensor]] = {}
    counts: dict[str, dict[str, float]] = {}

    def observe(site: Site, call: AttentionCall) -> None:
        pattern = compute_pattern(call, rows)
        for name, target in targets.items():
            at = target.to(pattern.p.device)[None, None, :, None]
            mass = pattern.keys.gather(-1, at.expand(*pattern.p.shape[:3], 1)).squeeze(-1)
            reached = pattern.visible.gather(-1, at[0].expand(*pattern.visible.shape[:2], 1))
            weight = reached.squeeze(-1) * pattern.weight  # [B, R]
            total = (mass * weight[:, None]).sum((0, 2)).double().cpu()
            mine, count = sums.setdefault(site.path, {}), counts.setdefault(site.path, {})
            mine[name] = mine.get(name, 0.0) + total
            count[name] = count.get(name, 0.0) + float(weight.sum())

    for _ in run_passes(model, repeats.batches, sites, observe, "analysis, repeats"):
        pass
    return {
        path: {
            name: [x / counts[path][name] if counts[path][name] else None for x in total.tolist()]
            for name, total in mine.items()
        }
        for path, mine in sums.items()
    }
