"""The calibration batches at one site."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from surgery.calibration.stream import Stream
from surgery.calibration.view import Aim, KeptBatch, SiteView, observe_site
from surgery.models.sites import Site

# Of the mean size over positions: no position may count for all others, nor be divided by zero.
_LEAST_SIZE = 1e-3


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

    def iterate_aims(self) -> Iterator[tuple[SiteView, Aim]]:
        """Yield the same without attention, each with what the site should put out."""
        for number in range(len(self.working.batches)):
            if number < len(self._kept):
                kept = self._kept[number]
                yield observe_site(self.work, self.site, kept, attention=False), kept.aim
            else:
                aim = self._compute_aim(number)
                yield self._observe(number, attention=False), aim

    def get_kept(self) -> list[KeptBatch]:
        """Return the batches whose inputs are kept, after all of `iterate_views`."""
        return self._kept

    def _observe(self, number: int, *, attention: bool) -> SiteView:
        with self.working.resume(number) as batch:
            return observe_site(self.work, self.site, batch, attention=attention)

    def _keep_batch(self, view: SiteView, number: int) -> KeptBatch:
        args, kwargs = view.block
        return KeptBatch(args, kwargs, self._compute_aim(number), view.real, view.masks)

    def _compute_aim(self, number: int) -> Aim:
        """Compute what the site of `work` should put out.

        That is what the original's site does. Where this is only added to the stream, it is that
        and what the stream lacks by then (as Li et al. 2025, arXiv:2504.02692, quantize), and
        errors count relative to the stream at their position: what reads it normalises it. In many
        models some positions are hundreds of times larger than all others (Sun et al. 2024,
        arXiv:2402.17762), and would be all that counts. Changes below may make a position large, or
        keep it from it, so the larger of the two streams is what counts. Positions on which others
        rely count more (`surgery.calibration.sinks`).
        """
        output = self.original.get_output(number, self.site)
        stream, now = self.original.get_residual(number), self.working.get_residual(number)
        if stream is None or now is None:
            size = output.new_ones(output.shape[:-1], dtype=torch.float32)
            return Aim(output, self._get_weights(number, size) / size)
        wide = torch.promote_types(output.dtype, torch.float32)
        stream, now, output = stream.to(wide), now.to(wide), output.to(wide)
        size = measure_size(stream + output).maximum(measure_size(now))
        return Aim(output + (stream - now), self._get_weights(number, size) / size)

    def _get_weights(self, number: int, size: torch.Tensor) -> torch.Tensor:
        """Get what errors are multiplied by, whose squares are summed."""
        weights = self.original.weights
        if not weights or weights[number].shape != size.shape:
            return torch.ones_like(size)
        return weights[number].sqrt().to(size)


def measure_size(stream: torch.Tensor) -> torch.Tensor:
    """Measure the root mean square of a stream [B, N, D_model] at each position; above 0."""
    size = stream.square().mean(-1).sqrt()
    least = (_LEAST_SIZE * size.mean()).clamp_min(torch.finfo(size.dtype).tiny ** 0.5)
    return size.maximum(least)
