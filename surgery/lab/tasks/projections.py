"""Output projections of several tasks for one loaded model, and files that hold nothing else."""

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
from surgery.models.sites import find_sites

FORMAT = "1"
KIND = "output_projections"
# How many values of each tensor a fingerprint looks at, evenly spaced.
SAMPLED = 4096


class OutputProjections:
    """Several sets of output projections for one model, of which one is in use.

    A set is the weights and biases of all sites' output projections, by their names in the model.
    Switching exchanges pointers: it copies nothing, and leaves the rest of the model alone, so the
    model's own projections are back to the bit with ``use(None)``. What is in use holds for the
    whole model: calls that need different sets at once need a model each.

    Args:
        model: the base, as it was loaded.

    Raises:
        SurgeryError: the model has no attention, or some that is not understood.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._names = _tensor_names(model)
        self._sets: dict[str | None, dict[str, torch.Tensor]] = {None: self._current()}
        self._used: str | None = None
        self._identity = _identity(model, self._names)

    @property
    def names(self) -> list[str]:
        """The sets that can be used, in the order they came; the model's own is ``None``."""
        return [name for name in self._sets if name is not None]

    @property
    def used(self) -> str | None:
        return self._used

    def add(self, name: str, path: str | Path) -> None:
        """Read a set that `save` wrote; it is not used yet.

        Raises:
            SurgeryError: no such file, one of another base, or a name that is taken.
        """
        if not name or name in self._sets:
            raise SurgeryError(f"there is a set of output projections named {name!r} already")
        about, tensors = _read(Path(path))
        if about.get("kind") != KIND or about.get("format") != FORMAT:
            raise SurgeryError(f"{path} holds no output projections that this version reads")
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
        """Switch; ``None`` is the model's own.

        Raises:
            SurgeryError: no such set.
        """
        if name not in self._sets:
            valid = ", ".join(self.names) or "none were added"
            raise SurgeryError(f"no output projections named {name!r}: {valid}")
        self._sets[self._used] = self._current()  # `model.to` may have moved or cast them
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for key, tensor in self._sets[name].items():
            now = parameters[key].data
            parameters[key].data = tensor.to(device=now.device, dtype=now.dtype)
        self._used = name

    def save(self, path: str | Path, model: PreTrainedModel, name: str = "") -> None:
        """Write the output projections of `model`, which differs from the base in nothing else.

        Args:
            name: of the base, for messages.

        Raises:
            SurgeryError: another model, or one of which other weights changed too.
        """
        if _tensor_names(model) != self._names:
            raise SurgeryError(f"this {type(model).__name__} is another model than the base")
        if _identity(model, self._names)["rest"] != self._identity["rest"]:
            raise SurgeryError(
                "more than output projections differs from the base: a file with "
                "them alone would not be this model"
            )
        parameters = dict(model.named_parameters(remove_duplicate=False))
        tensors = {key: parameters[key].detach().cpu().contiguous().clone() for key in self._names}
        dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        about = {"kind": KIND, "format": FORMAT, "model": name, "dtype": dtype, **self._identity}
        path = Path(path)
        draft = path.with_name(path.name + ".partial")
        save_file(tensors, draft, metadata=about)
        draft.replace(path)

    def _current(self) -> dict[str, torch.Tensor]:
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        return {key: parameters[key].data for key in self._names}


def _tensor_names(model: PreTrainedModel) -> tuple[str, ...]:
    """Weights and biases of the output projections of all sites, each once."""
    anatomy = find_sites(model)
    if anatomy.unreadable or not anatomy.sites:
        block = next(iter(anatomy.unreadable), None)
        reason = f": {block.path}, {block.reason}" if block is not None else ""
        raise SurgeryError(f"attention of this {type(model).__name__} cannot be read{reason}")
    found = {
        f"{path}.{name}": None
        for path in dict.fromkeys(site.output.path for site in anatomy.sites)
        for name, _ in model.get_submodule(path).named_parameters()
    }
    return tuple(found)


def _identity(model: nn.Module, names: tuple[str, ...]) -> dict[str, str]:
    """Fingerprints of the output projections and of everything else."""
    own = set(names)
    parameters = list(model.named_parameters(remove_duplicate=False))
    return {
        "base": _fingerprint((k, p) for k, p in parameters if k in own),
        "rest": _fingerprint((k, p) for k, p in parameters if k not in own),
    }


def _fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 of names, shapes and evenly spaced values; cheap for any size of model."""
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
        raise SurgeryError(f"{path} is no safetensors file: {error}") from None
