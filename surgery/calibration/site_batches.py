"""The calibration batches at one site."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

from surgery.calibration.view import KeptBatch, SiteView, observe_site
from surgery.data.collate import Batch
from surgery.models.sites import Site


class SiteBatches:
    """Runs batches up to one site. For the first batches, it keeps the inputs of the site.

    Args:
        model: the original, whose output of the site is the target.
        work: a copy of it, with all changes before this site.
        keep: number of batches whose inputs are kept.
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
        self._kept: list[KeptBatch] = []

    def iterate_views(self) -> Iterator[SiteView]:
        """Yield what the site of `work` does with each batch."""
        for number, batch in enumerate(self.batches):
            if number < len(self._kept):
                yield observe_site(self.work, self.site, self._kept[number])
                continue
            view = observe_site(self.work, self.site, batch)
            if number < self.keep:
                self._kept.append(self._keep_batch(view, batch))
            yield view

    def iterate_targets(self) -> Iterator[tuple[SiteView, torch.Tensor]]:
        """Yield the same without attention, each with the original output."""
        for number, batch in enumerate(self.batches):
            kept = self._kept[number] if number < len(self._kept) else None
            view = observe_site(self.work, self.site, kept or batch, attention=False)
            yield view, kept.target if kept is not None else self._compute_target(batch)

    def get_kept(self) -> list[KeptBatch]:
        """Return the batches whose inputs are kept, after all of `iterate_views`."""
        return self._kept

    def _keep_batch(self, view: SiteView, batch: Batch) -> KeptBatch:
        args, kwargs = view.block
        return KeptBatch(args, kwargs, self._compute_target(batch), view.real, view.masks)

    def _compute_target(self, batch: Batch) -> torch.Tensor:
        target = observe_site(self.model, self.site, batch, attention=False).output
        assert target is not None
        return target
