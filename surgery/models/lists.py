"""Lists of modules, one for each head: as many as the tensors of a plan's result need."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

# No attention block has more heads; a record that asks for more is damaged.
MOST = 1024


def grow_lists(model: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """Append copies of their first module to the `ModuleList`s that lack one for these parameters.

    Args:
        names: of parameters, in order; those that are there already are skipped.

    Returns:
        Path of each list that grew → its length before.
    """
    grown: dict[str, int] = {}
    for name in names:
        path, _, place = name.rpartition(".")[0].rpartition(".")
        if not place.isdigit():
            continue
        modules = model.get_submodule(path)
        if isinstance(modules, nn.ModuleList) and int(place) >= len(modules):
            grown.setdefault(path, len(modules))
            set_length(model, path, int(place) + 1)
    return grown


def can_grow(model: nn.Module, name: str, most: int) -> bool:
    """Whether a parameter can come from a longer list: `name` is one of the first `most` places."""
    path, _, attribute = name.rpartition(".")
    owner, _, place = path.rpartition(".")
    modules = dict(model.named_modules()).get(owner)
    if not isinstance(modules, nn.ModuleList) or not len(modules) or not place.isdigit():
        return False
    return int(place) < most and attribute in dict(modules[0].named_parameters(recurse=False))


def set_length(model: nn.Module, path: str, length: int) -> None:
    """Shorten the `ModuleList` at `path`, or append copies of its first module.

    Raises:
        TypeError: there is another kind of module, or an empty list, or no length.
    """
    modules = model.get_submodule(path)
    if not isinstance(modules, nn.ModuleList) or not len(modules):
        raise TypeError(f"{path} is no list of modules")
    if type(length) is not int or not 1 <= length <= MOST:
        raise TypeError(f"{path} cannot have {length} modules")
    while len(modules) > length:
        del modules[-1]
    modules.extend(copy.deepcopy(modules[0]) for _ in range(length - len(modules)))


def drop_parameters(model: nn.Module, names: Iterable[str]) -> None:
    """Delete parameters, and modules at the end of a `ModuleList` that hold no others."""
    paths = set()
    for name in names:
        path, _, attribute = name.rpartition(".")
        delattr(model.get_submodule(path), attribute)
        paths.add(path.rpartition(".")[0])
    for path in paths:
        modules = model.get_submodule(path)
        while isinstance(modules, nn.ModuleList) and not any(
            True for _ in modules[-1].parameters()
        ):
            del modules[-1]


@contextmanager
def growing_lists(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Grow lists for these parameters inside the block, and shorten them after it."""
    grown = grow_lists(model, names)
    try:
        yield
    finally:
        for path, length in grown.items():
            set_length(model, path, length)


def list_lengths(model: nn.Module) -> Mapping[str, int]:
    """Path of every list of modules → its length."""
    return {
        path: len(module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    }
