"""Ablations that share their work: each row runs once, then every layer is resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from surgery.importance.capture import capture, stack_of
from surgery.importance.losses import Targets
from surgery.importance.replay import resume
from surgery.importance.work import Ablation, Batch, Work

# Positions side by side that are quickest on a CPU: more, and what lies between two matrix
# products no longer stays in its caches; fewer, and calls cost more than they do.
CPU_POSITIONS = 512
# Number of a cut, and [P, V] judged logits under it.
_Found = tuple[int, torch.Tensor]


class Shared:
    """What ablations of one model have in common.

    Raises:
        Unfit: see `stack_of`.
    """

    def __init__(self, work: Work, cuts: Sequence[Ablation]) -> None:
        self.work, self.cuts = work, cuts
        self.stack = stack_of(work.model, work.sites)
        # Site after site; heads and groups apart, as cuts of one size go side by side.
        alike: dict[tuple[int, int], list[int]] = {}
        for number, cut in enumerate(cuts):
            alike.setdefault((cut.site, len(cut.heads)), []).append(number)
        self.alike = list(alike.values())

    def rows(self, batch: Batch) -> int:
        """How many rows of `batch` to go through together; their ablations lie side by side."""
        return max(1, self._side_by_side(batch) // max(map(len, self.alike)))

    def run(self, batch: Batch) -> tuple[torch.Tensor, Callable[..., Iterator[_Found]]]:
        """Logits of the model as it is, and a function of the targets: judged logits per cut.

        Raises:
            Unfit: see `capture` and `resume`.
        """
        logits, moments = capture(self.work.model, self.stack, self.work.sites, batch)

        def resumed(where: Targets) -> Iterator[_Found]:
            rows = len(where.counts)
            many = max(1, self._side_by_side(batch) // rows)
            for numbers in self.alike:
                site = self.cuts[numbers[0]].site
                for start in range(0, len(numbers), many):
                    some = numbers[start : start + many]
                    found = resume(
                        self.work.model,
                        self.stack,
                        self.work.sites[site],
                        self.stack.index[site],
                        moments,
                        batch,
                        [self.cuts[number] for number in some],
                        where,
                    )
                    yield from zip(some, found, strict=True)

        return logits, resumed

    def _side_by_side(self, batch: Batch) -> int:
        """Rows, ablations included, that one pass takes."""
        values = [value for value in batch.values() if value.ndim > 1]
        if not values or values[0].device.type != "cpu":
            return self.work.memory_rows
        length = max(value.shape[1] for value in values)
        return max(1, min(self.work.memory_rows, CPU_POSITIONS // length))
