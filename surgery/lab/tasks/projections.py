"""Output projections of several tasks for one loaded model, and the files that hold them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from surgery.errors import SurgeryError
from surgery.files import write_whole
from surgery.models.sites import find_sites

FORMAT = "1"
KIND = "output_projections"
# Number of values of each tensor in a fingerprint, evenly spaced.
SAMPLED = 4096


class OutputProjections:
    """Several sets of output projections for one model. One set is in use.

    A set holds the weights and biases of the output projections of all sites, by their names in
    the model. To switch exchanges pointers: nothing is copied, the rest of the model stays as it
    is, and ``use(None)`` brings back the model's own projections to the bit. The set in use is
    that of the whole model: calls with different sets at the same time need a model each.

    Args:
        model: the base model, as it was loaded.

    Raises:
        SurgeryError: the model has no attention, or attention that is not understood.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._names = _list_tensor_names(model)
        self._sets: dict[str | None, dict[str, torch.Tensor]] = {None: self._get_current()}
        self._used: str | None = None
        self._identity = _compute_identity(model, self._names)

    @property
    def names(self) -> list[str]:
        """The sets that can be used, in the order in which they were added."""
        return [name for name in self._sets if name is not None]

    @property
    def used(self) -> str | None:
        return self._used

    def add(self, name: str, path: str | Path) -> None:
        """Read a set that `save` wrote, without using it yet.

        Raises:
            SurgeryError: the file is missing or made for another base, or the name is in use.
        """
        if not name or name in self._sets:
            raise SurgeryError(f"there is already a set of output projections named {name!r}")
        about, tensors = _read(Path(path))
        if about.get("kind") != KIND or about.get("format") != FORMAT:
            raise SurgeryError(f"{path} has no output projections that this version can read")
        own = self._sets[None]
        wrong = {key: about.get(key) for key in self._identity} != self._identity
        shapes = {key: tensor.shape for key, tensor in tensors.items()}
        if wrong or shapes != {key: tensor.shape for key, tensor in own.items()}:
            dtype = next(iter(own.values())).dtype
            raise SurgeryError(
                f"{path} was made for another base than this {type(self.model).__name__}: for "
                f"{about.get('model') or 'a model'} in {about.get('dtype')}, and this one is in "
                f"{str(dtype).removeprefix('torch.')}"
            )
        self._sets[name] = tensors

    def use(self, name: str | None) -> None:
        """Switch to a set; ``None``: the model's own.

        Raises:
            SurgeryError: there is no such set.
        """
        if name not in self._sets:
            valid = ", ".join(self.names) or "none were added"
            raise SurgeryError(f"no output projections named {name!r}: {valid}")
        self._sets[self._used] = self._get_current()  # `model.to` may have moved or cast them
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for key, tensor in self._sets[name].items():
            old = parameters[key].data
            parameters[key].data = tensor.to(device=old.device, dtype=old.dtype)
        self._used = name

    def save(self, path: str | Path, model: PreTrainedModel, name: str = "") -> None:
        """Write the output projections of `model`, which must not differ in anything else.

        Args:
            name: name of the base, for messages.

        Raises:
            SurgeryError: `model` is another model, or other weights changed too.
        """
        if _list_tensor_names(model) != self._names:
            raise SurgeryError(f"this {type(model).__name__} is another model than the base")
        if _compute_identity(model, self._names)["rest"] != self._identity["rest"]:
            raise SurgeryError(
                "more than the output projections differs from the base, so a file with only "
                "these would not be this model"
            )
        parameters = dict(model.named_parameters(remove_duplicate=False))
        tensors = {key: parameters[key].detach().cpu().contiguous().clone() for key in self._names}
        dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        about = {"kind": KIND, "format": FORMAT, "model": name, "dtype": dtype, **self._identity}
        with write_whole(Path(path)) as draft:
            save_file(tensors, draft, metadata=about)

    def _get_current(self) -> dict[str, torch.Tensor]:
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        return {key: parameters[key].data for key in self._names}


def _list_tensor_names(model: PreTrainedModel) -> tuple[str, ...]:
    """List weights and biases of the output projections of all sites, each once."""
    anatomy = find_sites(model)
    if anatomy.unreadable or not anatomy.sites:
        block = next(iter(anatomy.unreadable), None)
        reason = f": {block.path}, {block.reason}" if block is not None else ""
        raise SurgeryError(f"attention of this {type(model).__name__} cannot be read{reason}")
    names = {
        f"{path}.{name}": None
        for path in dict.fromkeys(site.output.path for site in anatomy.sites)
        for name, _ in model.get_submodule(path).named_parameters()
    }
    return tuple(names)


def _compute_identity(model: nn.Module, names: tuple[str, ...]) -> dict[str, str]:
    """Compute fingerprints of the output projections, and of everything else."""
    own = set(names)
    parameters = list(model.named_parameters(remove_duplicate=False))
    return {
        "base": _compute_fingerprint((k, p) for k, p in parameters if k in own),
        "rest": _compute_fingerprint((k, p) for k, p in parameters if k not in own),
    }


def _compute_fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Hash names, shapes and evenly spaced values (SHA-256); this is fast for any model."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // SAMPLED)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(flat[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path) -> tuple[Mapping[str, str], dict[str, torch.Tensor]]:
    if not path.is_file():
        raise SurgeryError(f"there is no file {path}")
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise SurgeryError(f"{path} is not a safetensors file: {error}") from None
