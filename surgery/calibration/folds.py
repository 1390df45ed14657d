"""Which positions of the calibration text are held out together, so that text judges other text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from surgery.data.collate import Batch

FOLDS = 4
# Text is known already where so many tokens in a row have been seen before.
GRAM = 32
REPEATED = -1
_IDS = ("input_ids", "decoder_input_ids")


class Folds:
    """A fold for every position of every batch.

    The text is cut into as many runs of equal length as there are folds. What repeats earlier text
    is in none of them: it would be judged by itself, and counted more than once.

    Attributes:
        count: number of folds.
        tokens: number of positions that repeat nothing; 0 where batches hold no token ids.
    """

    def __init__(self, batches: Sequence[Batch], count: int = FOLDS) -> None:
        self.count = count
        self._found: dict[str, list[torch.Tensor]] = {}
        for name in _IDS:
            if all(name in batch and batch[name].ndim == 2 for batch in batches):
                self._found[name] = _cut([batch[name] for batch in batches], count)
        self._rows = [len(next(iter(batch.values()))) for batch in batches]
        fresh = self._found.get(_IDS[0], [])
        self.tokens = sum(int((folds != REPEATED).sum()) for folds in fresh)

    def get(self, number: int, length: int) -> torch.Tensor:
        """Get the folds [B, length] of a batch; `REPEATED` where it repeats earlier text."""
        for found in self._found.values():
            if found[number].shape[1] == length:
                return found[number]
        # Positions that are no tokens, as those of images: row by row.
        before, rows, total = sum(self._rows[:number]), self._rows[number], sum(self._rows)
        if total < self.count:
            places = torch.arange(length) * self.count // length
            return places.expand(rows, -1)
        places = (before + torch.arange(rows)) * self.count // total
        return places[:, None].expand(-1, length)


def find_real_positions(model: PreTrainedModel, batch: Batch) -> torch.Tensor | None:
    """Find which positions of its predictions are no padding; ``None``: it is not said."""
    decodes = model.config.is_encoder_decoder
    return batch.get("decoder_attention_mask" if decodes else "attention_mask")


def _cut(batches: Sequence[torch.Tensor], count: int) -> list[torch.Tensor]:
    seen: set[bytes] = set()
    fresh = [torch.tensor([_find_fresh(row, seen) for row in batch.cpu()]) for batch in batches]
    total = max(1, sum(int(mask.sum()) for mask in fresh))
    return [
        (places * count // total).where(mask, torch.tensor(REPEATED))
        for mask, places in zip(fresh, number_positions(fresh), strict=True)
    ]


def number_positions(masks: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Number the positions that masks [B, N] choose, from 0, on from batch to batch."""
    before, found = 0, []
    for mask in masks:
        found.append((mask.flatten().cumsum(0) - 1).view_as(mask) + before)
        before += int(mask.sum())
    return found


def _find_fresh(row: torch.Tensor, seen: set[bytes]) -> list[bool]:
    """Find the positions at which tokens end that have not been seen in this order.

    The first ones, with too few before them, go by the first that has enough.
    """
    text, size = row.contiguous().numpy().tobytes(), row.element_size()
    whole = min(GRAM, len(row))
    found = []
    for end in range(whole, len(row) + 1):
        gram = text[(end - whole) * size : end * size]
        found.append(gram not in seen)
        seen.add(gram)
    return [found[0]] * (whole - 1) + found
