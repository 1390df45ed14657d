"""The layers of a model, one after another, and a forward pass that starts in the middle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from surgery.models.sites import Site


class NotResumable(Exception):  # noqa: N818  (not an error: there is a slower way)
    """The model cannot be resumed from the middle; the text says why."""


@dataclass(frozen=True)
class Stack:
    """The layers that hold the sites.

    Attributes:
        layers: in the order in which they run.
        index: number of each site's layer.
    """

    layers: Sequence[nn.Module]
    index: tuple[int, ...]


def find_stack(model: PreTrainedModel, sites: Sequence[Site]) -> Stack:
    """Find the list of layers that holds the sites.

    Raises:
        NotResumable: the sites lie in several lists of layers, or several lie in one layer.
    """
    if model.config.is_encoder_decoder:
        raise NotResumable("an encoder and a decoder are two stacks of layers")
    places = [_locate_site(model, site) for site in sites]
    if len({path for path, _ in places}) != 1:
        raise NotResumable("its sites lie in several lists of layers")
    index = tuple(number for _, number in places)
    if len(set(index)) < len(index):
        raise NotResumable("it has several sites in a layer")
    layers = model.get_submodule(places[0][0])
    assert isinstance(layers, nn.ModuleList)
    return Stack(tuple(layers), index)


def _locate_site(model: nn.Module, site: Site) -> tuple[str, int]:
    """Find the path of the outermost list of layers around a site, and the layer's number."""
    names = site.output.path.split(".")
    for end in range(1, len(names)):
        path = ".".join(names[:end])
        if isinstance(model.get_submodule(path), nn.ModuleList) and site.path.startswith(path):
            return path, int(names[end])
    raise NotResumable("its sites do not lie in a list of layers")


@contextmanager
def replaying(replies: dict[nn.Module, Any]) -> Iterator[None]:
    """Make modules return the given values instead of computing them."""

    def reply(value: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: value

    # Some modules have a forward of their own: accelerate's hooks, or one that is compiled.
    own = {module: vars(module)["forward"] for module in replies if "forward" in vars(module)}
    try:
        for module, value in replies.items():
            module.forward = reply(value)
        yield
    finally:
        for module in replies:
            vars(module).pop("forward", None)
            if module in own:
                module.forward = own[module]


def get_hidden(state: Any) -> torch.Tensor:
    """Get the hidden states from what a layer returned."""
    found: torch.Tensor = state[0] if isinstance(state, (tuple, list)) else state
    return found
