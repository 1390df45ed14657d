"""What each choice of each layer loses: one layer is replaced, the predictions are compared.

Puzzle's "replace one block" scores (Bercovich et al. 2024, arXiv:2411.19146, section 4.2), with the
closed-form calibration of each choice in place of its training.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from surgery.calibration.case import Calibration
from surgery.calibration.divergence import Divergence
from surgery.calibration.rows import put_parameter
from surgery.calibration.stream import Stream, Weights, open_streams
from surgery.data.collate import Batch
from surgery.models.copies import make_sharing_copy
from surgery.models.sites import Site
from surgery.plan.choice import Choice
from surgery.plan.operation import Operation

Key = tuple[str, str]
UNCHANGED: Key = ("", "unchanged")
# Of the gradient steps that a choice gets in the end. Without any, layers come in another order:
# steps make up for much in some of them, and for little in others.
SHARE_OF_STEPS = 1 / 3


@dataclass
class Walk:
    """What one walk through the layers found.

    Attributes:
        losses: per layer, choice → KL divergence in nats per prediction of the whole model, with
            all other layers as they are in this walk.
        choices: per layer, choice → what it is; without the unchanged layer.
        whole: the divergence of the model in which every layer is what was picked for it.
    """

    losses: list[dict[Key, float]] = field(default_factory=list)
    choices: list[dict[Key, Choice]] = field(default_factory=list)
    whole: float = 0.0


class Walker:
    """Walks through the layers of a copy of the model, and tries what each may become.

    Choices are fitted to all batches but the first, on which they are compared.

    Args:
        model: not changed.
        operations: what may be chosen.
        offered: per site, the keys of what it may become.
        compared: number of batches that choices are compared on.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sites: Sequence[Site],
        operations: Sequence[Operation],
        offered: Sequence[Collection[Key]],
        batches: Sequence[Batch],
        options: Calibration,
        compared: int,
    ) -> None:
        self.model, self.sites, self.operations = model, sites, operations
        self.offered = offered
        self.fitted, self.compared = batches[compared:] or batches, batches[:compared]
        self.options = replace(options, refine_steps=round(SHARE_OF_STEPS * options.refine_steps))
        self.work = make_sharing_copy(model)
        self._weights: Weights | None = None
        self._last: tuple[list[Key], Walk] | None = None
        self._original = [dict(self._get_block(site).named_parameters()) for site in sites]

    @torch.no_grad()
    def score(self, picked: Sequence[Key], advance: Callable[[Site, str], None]) -> Walk:
        """Measure every choice of every layer, with what was picked in all others.

        Args:
            picked: per layer; layers above must be so already (see `put`), those below become so.
            advance: called after every choice.
        """
        return self._walk(picked, advance, every=True)

    @torch.no_grad()
    def put(self, picked: Sequence[Key], advance: Callable[[Site, str], None]) -> Walk:
        """Let every layer become what was picked, each fitted on the stream of those below.

        Args:
            picked: per layer.
            advance: called after every choice that is tried on the way.
        """
        if self._last is None or list(picked) != self._last[0]:
            self._walk(picked, advance, every=False)
        assert self._last is not None
        return self._last[1]

    @torch.no_grad()
    def measure_entropy(self) -> float:
        """Measure the loss of the original on labels drawn from itself, in nats per prediction."""
        original = Stream(self.model, self.compared)
        return Divergence(original, len(self.compared)).measure_entropy()

    def _walk(
        self, picked: Sequence[Key], advance: Callable[[Site, str], None], *, every: bool
    ) -> Walk:
        models = self.model, self.work
        original, working = open_streams(models, self.sites, self.fitted, self._weights)
        self._weights = original.weights
        before, changed = open_streams(models, self.sites, self.compared, ())
        divergence, walk = Divergence(before, len(self.compared)), Walk()
        for number, site in enumerate(self.sites):
            changed.move_to(site)
            self._put(site, self._original[number])
            losses, choices = {UNCHANGED: 0.0}, {}
            if every:
                losses[UNCHANGED] = divergence.measure(changed)
            kept = self._original[number]
            names = {name for name, _ in self.offered[number]} if every else {picked[number][0]}
            for operation in self.operations:
                if operation.name not in names:
                    continue
                trials = operation.try_choices(site, original, working, self.options)
                with closing(trials):
                    for choice in trials:
                        if choice.key not in self.offered[number]:
                            continue
                        choices[choice.key] = choice
                        if every:
                            losses[choice.key] = divergence.measure(changed)
                        advance(site, choice.name)
                        if choice.key == picked[number]:
                            kept = dict(self._get_block(site).named_parameters())
                            if not every:
                                break
            self._put(site, kept)
            walk.losses.append(losses)
            walk.choices.append(choices)
        walk.whole = divergence.measure(changed)
        self._last = list(picked), walk
        return walk

    def _get_block(self, site: Site) -> nn.Module:
        return self.work.get_submodule(site.block)

    def _put(self, site: Site, parameters: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            put_parameter(self._get_block(site), name, parameter)
