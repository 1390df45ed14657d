"""Compare the shapes in a checkpoint's headers with a model, before any weight is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from surgery.files import read_json
from surgery.models.sites import ROLES, find_sites

# Name, shape in the checkpoint, shape in the model.
Misfit = tuple[str, list[int], list[int]]


def find_header_misfit(directory: Path, model: PreTrainedModel) -> Misfit | None:
    """Find the first tensor of an attention projection that has another shape in the checkpoint.

    Only headers are read. Names that the checkpoint does not have, and files that cannot be read,
    are left to the loader, which knows how names are converted.
    """
    wanted = dict(_iterate_shapes(model))
    aliases = {alias: name for name in wanted for alias in _list_aliases(model, name)}
    for alias, shape in _read_shapes(directory, aliases):
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


def _read_shapes(directory: Path, names: Iterable[str]) -> Iterator[tuple[str, list[int]]]:
    for file, held in _locate_tensors(directory, set(names)).items():
        try:
            with safe_open(file, framework="pt") as tensors:
                present = set(tensors.keys())
                for name in sorted(present & held):
                    yield name, list(tensors.get_slice(name).get_shape())
        except (SafetensorError, OSError):
            continue


def _locate_tensors(directory: Path, names: set[str]) -> dict[Path, set[str]]:
    """Find the files that hold these tensors, as transformers does; only in the directory."""
    whole = directory / SAFE_WEIGHTS_NAME
    if whole.is_file():
        return {whole: names}
    try:
        index: Any = read_json(directory / SAFE_WEIGHTS_INDEX_NAME)
        shards = dict(index["weight_map"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    files: dict[Path, set[str]] = {}
    for name in names & shards.keys():
        shard = shards[name]
        if isinstance(shard, str) and shard == Path(shard).name:
            files.setdefault(directory / shard, set()).add(name)
    return files
