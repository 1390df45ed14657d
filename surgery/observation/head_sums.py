"""Running weighted sums per head: all that monitors keep between two log lines."""

from __future__ import annotations

import torch
import torch.distributed as dist


class HeadSums:
    """Weighted sums of named per-head values, by site.

    Every value has a weight of its own, so values over different rows or examples stay means.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self._sums: dict[str, torch.Tensor] = {}

    def start(self, site: str, heads: int, device: torch.device) -> None:
        """Make `site` known, so that it has a line even where nothing is added to it."""
        if site not in self._sums:
            # MPS has no float64.
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self._sums[site] = torch.zeros(2 * len(self.names), heads, dtype=dtype, device=device)

    def add(self, site: str, values: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Add for `site`: name → (sum [H], weight [H] or scalar)."""
        rows = []
        for name in self.names:
            total, weight = values[name]
            rows += [total.detach(), weight.detach().expand_as(total)]
        self.start(site, len(rows[0]), rows[0].device)
        sums = self._sums[site]
        self._sums[site] = sums + torch.stack([row.to(sums.dtype) for row in rows])

    def gather(self) -> None:
        """Add up over the processes of a distributed run. All must call; one may lack any site."""
        mine = {site: sums.cpu() for site, sums in self._sums.items()}
        everyone: list[dict[str, torch.Tensor]] = [{}] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        self._sums = {}
        for theirs in everyone:
            for site, sums in theirs.items():
                self._sums[site] = self._sums[site] + sums if site in self._sums else sums

    @property
    def empty(self) -> bool:
        """Whether no value of any head was added."""
        return all(bool((sums[1::2] == 0).all()) for sums in self._sums.values())

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
