"""The calibration batches at one site."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from surgery.calibration.stream import Stream
from surgery.calibration.view import KeptBatch, SiteView, observe_site
from surgery.models.sites import Site


class SiteBatches:
    """Runs batches up to one site. For the first batches, it keeps the inputs of the site.

    Args:
        original: the batches in the original, whose stream after the site is aimed at.
        working: the same in a copy of it, with all changes before this site.
        keep: number of batches whose inputs are kept.
    """

    def __init__(self, original: Stream, working: Stream, site: Site, keep: int) -> None:
        self.original, self.working, self.site, self.keep = original, working, site, keep
        self.work, self.folds = working.model, working.folds
        self._kept: list[KeptBatch] = []
        original.move_to(site)
        working.move_to(site)

    def iterate_views(self) -> Iterator[SiteView]:
        """Yield what the site of `work` does with each batch."""
        for number in range(len(self.working.batches)):
            if number < len(self._kept):
                yield observe_site(self.work, self.site, self._kept[number])
                continue
            view = self._observe(number, attention=True)
            if number < self.keep:
                self._kept.append(self._keep_batch(view, number))
            yield view

    def iterate_targets(self) -> Iterator[tuple[SiteView, torch.Tensor]]:
        """Yield the same without attention, each with the original output."""
        for number in range(len(self.working.batches)):
            if number < len(self._kept):
                kept = self._kept[number]
                yield observe_site(self.work, self.site, kept, attention=False), kept.target
            else:
                target = self._compute_target(number)
                yield self._observe(number, attention=False), target

    def get_kept(self) -> list[KeptBatch]:
        """Return the batches whose inputs are kept, after all of `iterate_views`."""
        return self._kept

    def _observe(self, number: int, *, attention: bool) -> SiteView:
        with self.working.resume(number) as batch:
            return observe_site(self.work, self.site, batch, attention=attention)

    def _keep_batch(self, view: SiteView, number: int) -> KeptBatch:
        args, kwargs = view.block
        target = self._compute_target(number)
        return KeptBatch(args, kwargs, target, view.real, view.masks)

    def _compute_target(self, number: int) -> torch.Tensor:
        """Compute what the site of `work` should put out.

        That is what the original's site does; and, where this is only added to the stream, what the
        stream lacks by then (as Li et al. 2025, arXiv:2504.02692, quantize).
        """
        target = self.original.get_output(number, self.site)
        aim, now = self.original.get_residual(number), self.working.get_residual(number)
        if aim is None or now is None:
            return target
        wide = torch.promote_types(target.dtype, torch.float32)
        return target.to(wide) + (aim.to(wide) - now.to(wide))
