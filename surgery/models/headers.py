"""Compare the shapes in a checkpoint's headers with a model, before any weight is read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel

from surgery.errors import ConfigError
from surgery.models.sites import ROLES, find_sites
from surgery.models.weight_files import list_weight_files, read_shapes

# Name, shape in the checkpoint, shape in the model.
Misfit = tuple[str, list[int], list[int]]


def find_header_misfit(directory: Path, model: PreTrainedModel) -> Misfit | None:
    """Find the first tensor of an attention projection that has another shape in the checkpoint.

    Only headers are read. Names that the checkpoint does not have, and files that cannot be read,
    are left to the loader, which knows how names are converted.
    """
    try:
        files = list_weight_files(
            directory, directory, getattr(model.config, "transformers_weights", None)
        )
    except ConfigError:  # said once the weights are wanted
        return None
    wanted = dict(_iterate_shapes(model))
    aliases = {alias: name for name in wanted for alias in _list_aliases(model, name)}
    for alias, shape in _read_shapes(files, aliases):
        name = aliases[alias]
        if shape != wanted[name]:
            return name, shape, wanted[name]
    return None


def _iterate_shapes(model: PreTrainedModel) -> Iterator[tuple[str, list[int]]]:
    for site in find_sites(model).sites:
        for role in (*ROLES, "output"):
            path = site.get_projection(role).path
            tensors = model.get_submodule(path).named_parameters(prefix=path, recurse=False)
            yield from ((name, list(tensor.shape)) for name, tensor in tensors)


def _list_aliases(model: PreTrainedModel, name: str) -> tuple[str, ...]:
    """List the names of a tensor in checkpoints of the model with and without a head."""
    prefix = f"{model.base_model_prefix}."
    return (name, name.removeprefix(prefix) if name.startswith(prefix) else f"{prefix}{name}")


def _read_shapes(files: Iterable[Path], names: Iterable[str]) -> Iterator[tuple[str, list[int]]]:
    for file in filter(os.path.isfile, files):
        try:
            yield from read_shapes(file, names).items()
        except (SafetensorError, OSError, ValueError):
            continue
