"""Running weighted sums per head: all that monitors keep between two log lines."""

from __future__ import annotations

from collections.abc import Callable

import torch


class HeadSums:
    """Weighted sums of named per-head values, by site.

    Every value has a weight of its own, so values over different rows or examples stay means.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, site: str, values: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Add for `site`: name → (sum [H], weight [H] or scalar)."""
        rows = []
        for name in self.names:
            total, weight = values[name]
            total = total.detach().double()
            rows += [total, weight.detach().double().expand_as(total)]
        update = torch.stack(rows)
        self._sums[site] = self._sums[site] + update if site in self._sums else update

    def reduce(self, combine: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Combine each site's sums, over the processes of a distributed run."""
        for site in sorted(self._sums):
            self._sums[site] = combine(self._sums[site])

    def means(self) -> dict[str, dict[str, torch.Tensor]]:
        """site → name → mean [H], on the CPU; NaN where nothing was added."""
        return {
            site: {
                name: (sums[2 * i] / sums[2 * i + 1]).float().cpu()
                for i, name in enumerate(self.names)
            }
            for site, sums in self._sums.items()
        }

    def clear(self) -> None:
        self._sums.clear()
