"""One pass over some rows, and what of it has to be kept so that no layer runs in vain again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from surgery.importance.work import Batch, logits_of
from surgery.models.sites import Site


class Unfit(Exception):  # noqa: N818  (no error: there is another way)
    """A model that cannot be resumed from the middle; the text says why."""


@dataclass(frozen=True)
class Stack:
    """The layers that hold the sites.

    Attributes:
        layers: in the order in which they run.
        index: of each site's layer.
    """

    layers: Sequence[nn.Module]
    index: tuple[int, ...]


def stack_of(model: PreTrainedModel, sites: Sequence[Site]) -> Stack:
    """Raises: Unfit, where the sites are not one to a layer of one list of layers."""
    if model.config.is_encoder_decoder:
        raise Unfit("an encoder and a decoder are two stacks of layers")
    found = [_place(model, site) for site in sites]
    if len({path for path, _ in found}) != 1:
        raise Unfit("its sites lie in several lists of layers")
    index = tuple(number for _, number in found)
    if len(set(index)) < len(index):
        raise Unfit("it has several sites in a layer")
    layers = model.get_submodule(found[0][0])
    assert isinstance(layers, nn.ModuleList)
    return Stack(tuple(layers), index)


def _place(model: nn.Module, site: Site) -> tuple[str, int]:
    """The outermost list of layers around a site, and which of them it is in."""
    names = site.output.path.split(".")
    for end in range(1, len(names)):
        path = ".".join(names[:end])
        if isinstance(model.get_submodule(path), nn.ModuleList) and site.path.startswith(path):
            return path, int(names[end])
    raise Unfit("its sites do not lie in a list of layers")


@dataclass
class Moment:
    """What one layer did.

    Attributes:
        output: of the layer, as it returned it.
        attended: what the attending module returned; ``None`` for a layer without a site.
        inputs: [B, N, Hq * unit], of the site's output projection.
        projected: [B, N, D_model], its output.
        earlier: what the layer's own modules returned that ran before the attending one.
    """

    output: Any = None
    attended: Any = None
    inputs: torch.Tensor | None = None
    projected: torch.Tensor | None = None
    earlier: dict[nn.Module, Any] = field(default_factory=dict)


def capture(
    model: PreTrainedModel, stack: Stack, sites: Sequence[Site], batch: Batch
) -> tuple[torch.Tensor, list[Moment]]:
    """Logits of `batch`, and a moment for each layer.

    Raises:
        Unfit: layers that do not each run once, in order.
    """
    moments = [Moment() for _ in stack.layers]
    order: list[int] = []
    with ExitStack() as hooks:

        def after(module: nn.Module, function: Callable[[Any, Any], None]) -> None:
            def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                function((args, kwargs), output)

            handle = module.register_forward_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)

        for number, layer in enumerate(stack.layers):

            def whole(_: Any, output: Any, number: int = number) -> None:
                order.append(number)
                moments[number].output = output

            after(layer, whole)
        for number, site in zip(stack.index, sites, strict=True):
            _watch(after, model, stack.layers[number], site, moments[number])
        logits = logits_of(model, batch)
    if order != list(range(len(moments))):
        raise Unfit("its layers do not each run once, in order")
    return logits, moments


def _watch(
    after: Callable[[nn.Module, Callable[[Any, Any], None]], None],
    model: nn.Module,
    layer: nn.Module,
    site: Site,
    moment: Moment,
) -> None:
    def attended(_: Any, output: Any) -> None:
        moment.attended = output

    def projected(given: Any, output: torch.Tensor) -> None:
        args, kwargs = given
        moment.inputs = args[0] if args else next(iter(kwargs.values()))
        moment.projected = output

    after(model.get_submodule(site.path), attended)
    after(model.get_submodule(site.output.path), projected)
    for child in layer.children():

        def earlier(_: Any, output: Any, child: nn.Module = child) -> None:
            if moment.inputs is None and moment.attended is None:
                moment.earlier[child] = output

        after(child, earlier)
