"""Running sums per head: all that a monitor keeps between two log lines."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.distributed as dist


class HeadSums:
    """Weighted sums of named per-head values, or their maxima, by site.

    Every value has its own weight, so the results are means even over different numbers of rows
    or examples.

    Args:
        names: of the values.
        maxima: names of which the largest value is kept; weight zero means that there is none.
        roots: names whose result is the square root of the mean.
    """

    def __init__(
        self, names: tuple[str, ...], maxima: Collection[str] = (), roots: Collection[str] = ()
    ) -> None:
        self.names = names
        self.roots = frozenset(roots)
        self._maxima = [i for i, name in enumerate(names) if name in maxima]
        self._sums: dict[str, torch.Tensor] = {}

    def start(self, site: str, heads: int, device: torch.device) -> None:
        """Register `site`, so that it has a result even if nothing is added to it."""
        if site not in self._sums:
            # MPS has no float64.
            dtype = torch.float32 if device.type == "mps" else torch.float64
            sums = torch.zeros(2, len(self.names), heads, dtype=dtype, device=device)
            sums[0, self._maxima] = float("-inf")
            self._sums[site] = sums

    def add(self, site: str, values: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Add for `site`: name → (sum or maximum [H], weight [H] or scalar)."""
        totals = torch.stack([values[name][0].detach() for name in self.names])
        weights = [values[name][1].detach().expand(totals.shape[1]) for name in self.names]
        self.start(site, totals.shape[1], totals.device)
        sums = self._sums[site]
        added = torch.stack([totals.to(sums.dtype), torch.stack(weights).to(sums.dtype)])
        self._sums[site] = self._merge(sums, added)

    def gather(self) -> None:
        """Merge the sums of all processes. All must call; each may lack some sites."""
        mine = {site: sums.cpu() for site, sums in self._sums.items()}
        everyone: list[dict[str, torch.Tensor]] = [{}] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        self._sums = {}
        for theirs in everyone:
            for site, sums in theirs.items():
                known = self._sums.get(site)
                self._sums[site] = sums if known is None else self._merge(known, sums)

    @property
    def empty(self) -> bool:
        """Whether no value of any head has been added."""
        return all(bool((sums[1] == 0).all()) for sums in self._sums.values())

    def summarize(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return site → name → mean, maximum or root mean [H], on the CPU.

        Where nothing was added the result is NaN. A maximum over values with a NaN is infinite.
        """
        figures = {}
        for site, sums in self._sums.items():
            total, weight = sums.cpu()
            values = total / weight
            # A NaN among the values means out of bounds; NaN in the result means "not seen".
            largest = total[self._maxima].nan_to_num(nan=float("inf"), posinf=float("inf"))
            values[self._maxima] = largest.where(
                weight[self._maxima] > 0, torch.tensor(float("nan"), dtype=total.dtype)
            )
            values = values.float()
            figures[site] = {
                name: value.sqrt() if name in self.roots else value
                for name, value in zip(self.names, values, strict=True)
            }
        return figures

    def clear(self) -> None:
        self._sums.clear()

    def _merge(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        merged = one + other
        for i in self._maxima:
            merged[0, i] = torch.maximum(one[0, i], other[0, i])
        return merged
