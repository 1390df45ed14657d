"""Reference models: ask the architecture's own code what the result must look like.

A reference model is a new model of the same class, built on the meta device from a patched config.
It shows which attributes the modules hold besides their tensors, which tensors depend on a head
count, and whether the config alone can describe the result. So no list of model families is needed.
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
from transformers import PreTrainedConfig, PreTrainedModel

from surgery.errors import ConfigError
from surgery.models.attributes import Attributes, is_plain, to_plain
from surgery.models.config import apply_patch, get_key, make_head_count_patch
from surgery.models.sites import Site

Shapes = dict[str, tuple[int, ...]]
# What architectures raise for a count that they do not accept; the errors have no common class.
_REFUSALS = (
    ValueError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    AssertionError,
    LookupError,
    StrictDataclassError,
)


def _find_lost_key(config: PreTrainedConfig, patch: Mapping[str, Any]) -> str | None:
    """Find a key of the patch that another value replaces once the config is saved and read."""
    read = type(config).from_dict(config.to_dict())
    for key in patch:
        value = get_key(config, key)
        # Nested values may be completed as they are read.
        if not isinstance(value, Mapping) and get_key(read, key) != value:
            return key
    return None


class ReferenceModels:
    """The reference models of one model. Each one is built only once.

    Args:
        model: gives the class and the config; it may be on the meta device.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._built: dict[str, PreTrainedModel | ConfigError] = {}
        self._differences: dict[str, Attributes] = {}

    def get(self, patch: Mapping[str, Any]) -> PreTrainedModel:
        """Return the model that the patched config describes.

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
        config._attn_implementation = "eager"  # the model never runs; others may need a GPU
        try:
            apply_patch(config, patch)
            lost = _find_lost_key(config, patch)
            if lost is not None:
                return ConfigError(
                    "attention",
                    f"a {config.model_type} config does not keep {lost}={patch[lost]} when it is "
                    "saved and read again",
                )
            with torch.device("meta"):
                return type(self._model)(config).eval()
        except _REFUSALS as error:
            values = ", ".join(f"{name}={value}" for name, value in patch.items())
            reason = _format_refusal(error)
            return ConfigError(
                "attention",
                f"{config.model_type} does not accept {values or 'its own config'}: {reason}",
            )

    def get_for_site(self, old: Site, new: Site) -> PreTrainedModel | None:
        """Return one in which site `old` is as `new`; ``None`` if no config describes that."""
        patch = make_head_count_patch(self._model.config, [old], [new])
        if patch is None:
            return None
        try:
            reference = self.get(patch)
            reference.get_submodule(new.path)
        except (ConfigError, AttributeError):
            return None
        # Its attributes are useful only if its projections are the planned ones.
        return reference if _projections_fit(new, reference) else None

    def find_attributes(self, patch: Mapping[str, Any]) -> Attributes:
        """Find module path → attribute → value that change with a patched config.

        Modules that were removed from the model, although its config has them, are left out.

        Raises:
            ConfigError: the architecture does not accept the patched config, or has other modules
                with it.
        """
        if not patch:
            return {}
        key = json.dumps(patch, sort_keys=True)
        if key not in self._differences:
            differences = find_config_differences(self.get({}), self.get(patch), patch)
            present = {path for path, _ in self._model.named_modules()}
            self._differences[key] = {
                path: values for path, values in differences.items() if path in present
            }
        return self._differences[key]


def _format_refusal(error: BaseException) -> str:
    """Format the error of an architecture in one line, without the names of its validators."""
    text = " ".join(str(error).split())
    return re.sub(r"^Class validation error for validator '\w+': \w+: ", "", text).rstrip(".")


def _projections_fit(site: Site, reference: PreTrainedModel) -> bool:
    wanted: Shapes = {}
    for role in ("query", "key", "value", "output"):
        projection = site.get_projection(role)
        shape = (projection.out_features, projection.in_features)
        wanted[f"{projection.path}.weight"] = shape[::-1] if projection.transposed else shape
    for norm, heads in ((site.q_norm, site.q_heads), (site.k_norm, site.kv_heads)):
        if norm is not None:
            wanted |= norm.list_shapes(heads)
    shapes = get_shapes(reference)
    return all(shapes.get(name) == shape for name, shape in wanted.items())


def find_config_differences(
    before: PreTrainedModel, after: PreTrainedModel, patch: Mapping[str, Any]
) -> Attributes:
    """Find the plain attributes in which two reference models differ.

    Raises:
        ConfigError: their tensors differ too.
    """
    shapes = get_shapes(before), get_shapes(after)
    name = find_first_difference(*shapes)
    if name is not None:
        verb = "change" if name in shapes[0] and name in shapes[1] else "add"
        verb = verb if name in shapes[1] else "remove"
        raise ConfigError("attention", f"a changed {', '.join(patch)} would {verb} {name}")
    old, new = dict(before.named_modules()), dict(after.named_modules())
    differences = {
        path: find_differing_attributes(old[path], new[path]) for path in new if path in old
    }
    return {path: values for path, values in differences.items() if values}


def find_differing_attributes(old: nn.Module, new: nn.Module) -> dict[str, Any]:
    """Find the plain attributes of `new` that `old` lacks or holds with another value."""
    values = {}
    for name, value in vars(new).items():
        if name.startswith("_") or name == "training" or not is_plain(value):
            continue
        if vars(old).get(name) != value:
            values[name] = to_plain(value)
    return values


def list_ancestors(path: str) -> list[str]:
    """List the paths of all modules around the one at `path`, the model ("") first."""
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(len(parts))]


def get_shapes(module: nn.Module, prefix: str = "") -> Shapes:
    """Return the shape of every tensor of the state dict."""
    state = module.state_dict(prefix=prefix)
    return {name: tuple(t.shape) for name, t in state.items() if isinstance(t, torch.Tensor)}


def find_first_difference(a: Shapes, b: Shapes) -> str | None:
    """Find the first name whose shapes differ."""
    return next((name for name in [*a, *b] if a.get(name) != b.get(name)), None)
