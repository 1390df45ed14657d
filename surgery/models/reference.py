"""Asking the architecture's own code what the result must look like.

A reference model is a fresh model of the same class, built on the meta device from a patched
config. It says which attributes modules hold besides their tensors, which tensors depend on a head
count, and whether the config alone can say the result. No list of families has to be kept for that.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel

from surgery.errors import ConfigError
from surgery.models.attributes import Attributes
from surgery.models.config import apply_patch, head_count_patch
from surgery.models.sites import Site

Shapes = dict[str, tuple[int, ...]]
# What an architecture raises for a count it does not take: no single base class covers it.
_REFUSALS = (
    ValueError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    AssertionError,
    KeyError,
    StrictDataclassError,
)
_PLAIN = (bool, int, float, str, type(None))


class ReferenceModels:
    """The reference models of one model, each built once.

    Args:
        model: whose class and config they have; it may live on the meta device.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._built: dict[str, PreTrainedModel | ConfigError] = {}
        self._differences: dict[str, Attributes] = {}

    def of(self, patch: Mapping[str, Any]) -> PreTrainedModel:
        """The model that the patched config describes.

        Raises:
            ConfigError: the architecture does not accept the patched config.
        """
        key = json.dumps(patch, sort_keys=True)
        if key not in self._built:
            self._built[key] = self._build(patch)
        built = self._built[key]
        if isinstance(built, ConfigError):
            raise built
        return built

    def _build(self, patch: Mapping[str, Any]) -> PreTrainedModel | ConfigError:
        config = copy.deepcopy(self._model.config)
        config._attn_implementation = "eager"  # it never runs; others may need a GPU
        try:
            apply_patch(config, patch)
            type(config).from_dict(config.to_dict())  # what is saved must be read again
            with torch.device("meta"):
                return type(self._model)(config).eval()
        except _REFUSALS as error:
            fields = ", ".join(f"{name}={value}" for name, value in patch.items())
            return ConfigError(
                "attention",
                f"{config.model_type} does not accept {fields or 'its own config'}: {_said(error)}",
            )

    def of_site(self, old: Site, new: Site) -> PreTrainedModel | None:
        """One in which the site is as `new` says; ``None`` where no config can say it."""
        patch = head_count_patch(self._model.config, [old], [new])
        if patch is None:
            return None
        try:
            reference = self.of(patch)
            module = reference.get_submodule(new.path)
        except (ConfigError, AttributeError):
            return None
        # Its attributes are of use only where its projections are the planned ones.
        return reference if _projections_fit(new, reference) and module is not None else None

    def attributes(self, patch: Mapping[str, Any]) -> Attributes:
        """Module path → attribute → value that a patched config decides otherwise.

        Left out are modules that the model has not, though its config says so: they were removed.

        Raises:
            ConfigError: the architecture does not accept the patched config, or would have other
                modules by it.
        """
        if not patch:
            return {}
        key = json.dumps(patch, sort_keys=True)
        if key not in self._differences:
            found = config_differences(self.of({}), self.of(patch), patch)
            held = {path for path, _ in self._model.named_modules()}
            self._differences[key] = {path: found[path] for path in found if path in held}
        return self._differences[key]


def _said(error: BaseException) -> str:
    """What an architecture says, without the names of its validators."""
    text = " ".join(str(error).split())
    return re.sub(r"^Class validation error for validator '\w+': \w+: ", "", text).rstrip(".")


def _projections_fit(site: Site, reference: PreTrainedModel) -> bool:
    for role in ("query", "key", "value", "output"):
        projection = site.projection(role)
        try:
            weight = reference.get_parameter(f"{projection.path}.weight")
        except AttributeError:
            return False
        shape = (projection.out_features, projection.in_features)
        if tuple(weight.shape) != (shape[::-1] if projection.transposed else shape):
            return False
    for norm in (site.q_norm, site.k_norm):
        if norm is not None:
            for tensor in norm.tensors:
                try:
                    if tuple(reference.get_parameter(f"{norm.path}.{tensor}").shape) != (
                        norm.size,
                    ):
                        return False
                except AttributeError:
                    return False
    return True


def config_differences(
    before: PreTrainedModel, after: PreTrainedModel, patch: Mapping[str, Any]
) -> Attributes:
    """Plain attributes in which two reference models differ.

    Raises:
        ConfigError: they differ in their tensors too.
    """
    shapes = shapes_of(before), shapes_of(after)
    name = first_difference(*shapes)
    if name is not None:
        verb = "change" if name in shapes[0] and name in shapes[1] else "add"
        verb = verb if name in shapes[1] else "remove"
        raise ConfigError("attention", f"a changed {', '.join(patch)} would {verb} {name}")
    old, new = dict(before.named_modules()), dict(after.named_modules())
    found = {path: differing_attributes(old[path], new[path]) for path in new if path in old}
    return {path: values for path, values in found.items() if values}


def differing_attributes(old: nn.Module, new: nn.Module) -> dict[str, Any]:
    """Plain attributes of `new` that `old` lacks or holds otherwise."""
    values = {}
    for name, value in vars(new).items():
        if name.startswith("_") or name == "training" or not _is_plain(value):
            continue
        if vars(old).get(name) != value:
            values[name] = plain(value)
    return values


def plain(value: Any) -> Any:
    """An attribute's value as JSON holds it."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def ancestors(path: str) -> list[str]:
    """Paths of all modules around the one at `path`, the model's own ("") first."""
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(len(parts))]


def shapes_of(module: nn.Module, prefix: str = "") -> Shapes:
    """Every tensor of a state dict."""
    state = module.state_dict(prefix=prefix)
    return {name: tuple(t.shape) for name, t in state.items() if isinstance(t, torch.Tensor)}


def first_difference(a: Shapes, b: Shapes) -> str | None:
    """The first name whose shapes differ."""
    return next((name for name in [*a, *b] if a.get(name) != b.get(name)), None)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return isinstance(value, _PLAIN)
