"""The calibration batches as they reach one site."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

from surgery.calibration.view import Batch, Kept, SiteView, see
from surgery.models.sites import Site


class SiteText:
    """Of the first batches the site's own inputs are kept; the others run from the start each time.

    Args:
        model: the original, whose output of the site is aimed at.
        work: a copy of it, operated on up to this site.
        keep: batches to keep; no target is looked at for none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        work: PreTrainedModel,
        site: Site,
        batches: Sequence[Batch],
        keep: int,
    ) -> None:
        self.model, self.work, self.site = model, work, site
        self.batches, self.keep = batches, keep
        self._kept: list[Kept] = []

    def views(self) -> Iterator[SiteView]:
        """What the site of `work` does with every batch."""
        for number, batch in enumerate(self.batches):
            if number < len(self._kept):
                yield see(self.work, self.site, self._kept[number])
                continue
            seen = see(self.work, self.site, batch)
            if number < self.keep:
                self._kept.append(self._keep(seen, batch))
            yield seen

    def targets(self) -> Iterator[tuple[SiteView, torch.Tensor]]:
        """The same without attention, each with the original's output."""
        for number, batch in enumerate(self.batches):
            kept = self._kept[number] if number < len(self._kept) else None
            seen = see(self.work, self.site, kept or batch, attention=False)
            yield seen, kept.target if kept is not None else self._target(batch)

    def kept(self) -> list[Kept]:
        """Those whose inputs are kept; known once `views` was gone through."""
        return self._kept

    def _keep(self, seen: SiteView, batch: Batch) -> Kept:
        args, kwargs = seen.block
        return Kept(args, kwargs, self._target(batch), seen.real, seen.masks)

    def _target(self, batch: Batch) -> torch.Tensor:
        target = see(self.model, self.site, batch, attention=False).output
        assert target is not None
        return target
