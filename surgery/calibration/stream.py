"""The calibration batches on their way through a model, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from surgery.calibration.folds import Folds
from surgery.calibration.sinks import weigh_positions
from surgery.calibration.view import copy_value, run_until
from surgery.console import say
from surgery.data.collate import Batch
from surgery.errors import join_lines
from surgery.models.sites import Site
from surgery.models.stack import NotResumable, Stack, find_stack, get_hidden, replaying

# How far a layer that runs on what was kept may be from a whole pass, relative to its output; or
# the rounding of its dtype, if that is more.
ROUNDING = 1e-5
# The same where what a site adds is taken away from what enters its layer; or so many roundings.
ROUNDING_OF_SUMS, ROUNDINGS_OF_SUMS = 1e-3, 16


Weights = Sequence[torch.Tensor]


class Stream:
    """Batches held before one layer of a model: no layer below has to run again.

    The model's own forward runs, and makes embeddings, masks and positions itself; the layers below
    return what the last of them returned. Per token, two hidden states are kept at most, and the
    outputs of one site.

    Args:
        folds: of the batches.
        stack: the model's layers; ``None`` if every pass has to start at the bottom.
        places: site path → number of its layer.
        sums: layers that only add their site's output to what enters them.
        weights: of the positions [B, N] of each batch; empty: all count alike.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Batch],
        folds: Folds | None = None,
        stack: Stack | None = None,
        places: dict[str, int] | None = None,
        sums: frozenset[int] = frozenset(),
        weights: Weights = (),
    ) -> None:
        self.model, self.batches, self.stack = model, batches, stack
        self.folds = folds or Folds(batches)
        self.weights = weights
        self._places, self._sums = places or {}, sums
        self._layer = 0
        self._states: list[Any] = [None] * len(batches)
        self._next: list[Any] = [None] * len(batches)
        self._outputs: list[torch.Tensor | None] = [None] * len(batches)

    def move_to(self, site: Site) -> None:
        """Let the batches run up to the layer of `site`. They cannot go back."""
        if self.stack is None:
            return
        layer = self._places[site.path]
        if layer == self._layer:
            return
        for number in range(len(self.batches)):
            if self._next[number] is not None and layer == self._layer + 1:
                self._states[number] = self._next[number]
            else:
                self._states[number] = self._run(number, self.stack.layers[layer - 1])
        self._layer = layer
        self._next = [None] * len(self.batches)
        self._outputs = [None] * len(self.batches)

    @contextmanager
    def resume(self, number: int) -> Iterator[Batch]:
        """Let a pass over the batch start at the present layer; yields the batch."""
        with ExitStack() as stack:
            if self.stack is not None and self._layer:
                below = self.stack.layers[: self._layer]
                # Some layers change their inputs in place.
                stack.enter_context(
                    replaying(dict.fromkeys(below, copy_value(self._states[number])))
                )
            yield self.batches[number]

    def get_output(self, number: int, site: Site) -> torch.Tensor:
        """Get the output [B, N, D_model] of the site, which lies in the present layer.

        The whole layer runs, once: its weights may not be changed afterwards.
        """
        found = self._outputs[number]
        if found is not None:
            return found
        outputs: list[torch.Tensor] = []
        output = self.model.get_submodule(site.output.path)
        handle = output.register_forward_hook(lambda _, args, made: outputs.append(made.clone()))
        try:
            if self.stack is None:
                self._run(number, self.model.get_submodule(site.block))
            else:
                self._next[number] = self._run(number, self.stack.layers[self._layer])
                self._outputs[number] = outputs[-1]
        finally:
            handle.remove()
        return outputs[-1]

    def get_residual(self, number: int) -> torch.Tensor | None:
        """Get what the site of the present layer adds to, [B, N, D_model].

        ``None`` where more is done with its output than adding it, or where nothing lies below.
        """
        return get_hidden(self._states[number]) if self._layer in self._sums else None

    def _run(self, number: int, end: nn.Module) -> Any:
        with self.resume(number) as batch:
            return run_until(self.model, batch, end)


def open_streams(
    models: Sequence[PreTrainedModel],
    sites: Sequence[Site],
    batches: Sequence[Batch],
    weights: Weights | None = None,
) -> list[Stream]:
    """Open a stream of the batches in each of several models alike; a line says if it is slow.

    Args:
        models: the first is the one that decides what positions count.
        weights: what they count instead: of the positions [B, N] of each batch; empty: all alike.
    """
    model, folds = models[0], Folds(batches)
    if not sites:
        return [Stream(one, batches, folds) for one in models]
    try:
        sums = check_stack(model, find_stack(model, sites), sites, batches[0])
    except NotResumable as reason:
        say(f"  calibration: every pass starts at the bottom, because {join_lines(reason)}")
        return [Stream(one, batches, folds) for one in models]
    if weights is None:
        weights = weigh_positions(model, find_stack(model, sites), batches)
    found = []
    for one in models:
        stack = find_stack(one, sites)
        places = dict(zip((site.path for site in sites), stack.index, strict=True))
        found.append(Stream(one, batches, folds, stack, places, sums, weights))
    return found


@torch.no_grad()
def check_stack(
    model: PreTrainedModel, stack: Stack, sites: Sequence[Site], batch: Batch
) -> frozenset[int]:
    """Check on the first row that every layer gives the same if those below are left out.

    Returns:
        the layers, not the first, that only add their site's output to what enters them: which give
        the same if the one is less by as much as the other is more.

    Raises:
        NotResumable: one layer does not, or the sites stand in another order than their layers.
    """
    if list(stack.index) != sorted(stack.index):
        raise NotResumable("its sites do not stand in the order of its layers")
    row = take_first_row(batch)
    whole: list[tuple[int, Any]] = []
    added: dict[int, torch.Tensor] = {}
    projections = {
        number: model.get_submodule(site.output.path)
        for number, site in zip(stack.index, sites, strict=True)
    }
    with ExitStack() as hooks:
        for number, layer in enumerate(stack.layers):

            def keep(_: nn.Module, args: Any, output: Any, number: int = number) -> None:
                whole.append((number, copy_value(output)))

            hooks.callback(layer.register_forward_hook(keep).remove)
        for number, projection in projections.items():

            def keep_added(_: nn.Module, args: Any, output: Any, number: int = number) -> None:
                added[number] = output.clone()

            hooks.callback(projection.register_forward_hook(keep_added).remove)
        run_until(model, row, stack.layers[-1])
    if [number for number, _ in whole] != list(range(len(stack.layers))):
        raise NotResumable("its layers do not each run once, in order")
    sums = set()
    for number in range(1, len(stack.layers)):
        (_, before), (_, after) = whole[number - 1 : number + 1]
        layer, below = stack.layers[number], stack.layers[:number]
        made = _run_on(model, row, number, layer, dict.fromkeys(below, copy_value(before)))
        if not _is_same(made, after, ROUNDING, 1):
            raise NotResumable(f"layer {number} reads more of those below than their output")
        hidden = get_hidden(before)
        if number not in added or hidden.shape != added[number].shape:
            continue
        # As large as the stream itself, and another one at every place.
        moved = hidden.flip(-1).roll(1, -1)
        replies = dict.fromkeys(below, _replace_hidden(before, hidden + moved))
        replies[projections[number]] = added[number] - moved
        try:
            made = _run_on(model, row, number, layer, replies)
        except NotResumable:
            continue
        if _is_same(made, after, ROUNDING_OF_SUMS, ROUNDINGS_OF_SUMS):
            sums.add(number)
    return frozenset(sums)


def take_first_row(batch: Batch) -> Batch:
    """Take the first row of every tensor that has one for each."""
    rows = len(next(iter(batch.values())))
    return {
        name: value[:1] if value.ndim and len(value) == rows else value
        for name, value in batch.items()
    }


def _run_on(
    model: PreTrainedModel,
    batch: Batch,
    number: int,
    layer: nn.Module,
    replies: dict[nn.Module, Any],
) -> Any:
    try:
        with replaying(replies):
            return run_until(model, batch, layer)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the model's own code may fail in any way when resumed
        raise NotResumable(f"layer {number} fails without those below") from error


def _replace_hidden(state: Any, hidden: torch.Tensor) -> Any:
    if not isinstance(state, (tuple, list)):
        return hidden
    parts = [hidden, *state[1:]]
    return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)


def _is_same(made: Any, expected: Any, rounding: float, roundings: int) -> bool:
    if isinstance(expected, (tuple, list)):
        pairs = zip(made, expected, strict=True)
        return all(_is_same(a, b, rounding, roundings) for a, b in pairs)
    if not isinstance(expected, torch.Tensor):
        return True
    if not expected.is_floating_point():
        return torch.equal(made, expected)
    most = max(rounding, roundings * torch.finfo(expected.dtype).eps)
    # Each position by itself: one may be larger than all others together.
    wide = torch.float32 if expected.device.type == "mps" else torch.float64
    distance = (made.to(wide) - expected.to(wide)).norm(dim=-1)
    return bool((distance <= most * expected.to(wide).norm(dim=-1)).all())
