"""Asking the architecture's own code what the result must look like.

A twin is a fresh model of the same class, built on the meta device from a patched config. It says
which attributes modules hold besides their tensors, which tensors depend on a head count, and
whether the config alone can say the result. No list of families has to be kept for that.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel

from surgery.anatomy import Site, find_sites
from surgery.errors import ConfigError
from surgery.plan.config_patch import apply_patch, head_count_patch
from surgery.plan.edits import SiteChange
from surgery.plan.plan import Export

Shapes = dict[str, tuple[int, ...]]
# What an architecture raises for a count it does not take: no single base class covers it.
_REFUSALS = (
    ValueError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    StrictDataclassError,
)
_PLAIN = (bool, int, float, str, type(None))


class Twins:
    """Twins of one model, each built once."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._built: dict[tuple[tuple[str, Any], ...], PreTrainedModel] = {}

    def of(self, patch: Mapping[str, Any]) -> PreTrainedModel:
        """The model that the patched config describes.

        Raises:
            ConfigError: the architecture does not accept the patched config.
        """
        key = tuple(sorted(patch.items()))
        if key not in self._built:
            config = copy.deepcopy(self._model.config)
            config._attn_implementation = "eager"  # a twin never runs; others may need a GPU
            try:
                apply_patch(config, patch)
                with torch.device("meta"):
                    self._built[key] = type(self._model)(config)
            except _REFUSALS as error:
                fields = ", ".join(f"{name}={value}" for name, value in patch.items())
                raise ConfigError(
                    "attention",
                    f"{config.model_type} does not accept {fields or 'its own config'}: "
                    f"{' '.join(str(error).split())}",
                ) from None
        return self._built[key]


def planned_shapes(model: PreTrainedModel, changes: Sequence[SiteChange]) -> Shapes:
    """Every tensor of the result."""
    shapes = _shapes(model)
    for change in changes:
        for edit in change.edits:
            shapes |= {spec.name: spec.shape for spec in edit.results}
    return shapes


def changed_attributes(
    before: Sequence[Site], after: Sequence[Site], shapes: Shapes, twins: Twins
) -> dict[str, dict[str, Any]]:
    """Module path → attribute → value, for what must be set besides tensors.

    Looked for in the changed sites, and in what is around them.

    Raises:
        ConfigError: the architecture's own code would build a changed site with other tensors, or
            holds in one place what would have to differ between sites.
    """
    found: dict[str, dict[str, Any]] = {}
    original = twins.of({})
    for old, new in zip(before, after, strict=True):
        twin = twins.of(head_count_patch([old], [new]))
        try:
            site = twin.get_submodule(new.path)
        except AttributeError:
            raise ConfigError(
                "attention", f"the model has {new.path}, and its config describes none"
            ) from None
        if old != new:
            _check_site(new, shapes, site)
        around = {path: twin.get_submodule(path) for path in _ancestors(new.path)}
        for path, module in (around | dict(site.named_modules(prefix=new.path))).items():
            values = _differing(original.get_submodule(path), module)
            if found.setdefault(path, values) != values:
                raise ConfigError(
                    "attention",
                    f"{path or type(twin).__name__} holds {', '.join(found[path] | values)} for "
                    "several attention blocks, so they cannot differ",
                )
    return {path: values for path, values in found.items() if values}


def _ancestors(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(len(parts))]


def _check_site(site: Site, shapes: Shapes, twin: nn.Module) -> None:
    planned = {n: shape for n, shape in shapes.items() if n.startswith(f"{site.path}.")}
    built = _shapes(twin, f"{site.path}.")
    name = _first_difference(planned, built)
    if name is not None:
        raise ConfigError(
            "attention",
            f"{type(twin).__name__} does not take {site.kv_heads} KV heads from its config: "
            f"{name} would be {built.get(name, 'absent')}, not {planned.get(name, 'absent')}",
        )


def _differing(old: nn.Module, new: nn.Module) -> dict[str, Any]:
    values = {}
    for name, value in vars(new).items():
        if name.startswith("_") or name == "training" or not _is_plain(value):
            continue
        if vars(old).get(name) != value:
            values[name] = list(value) if isinstance(value, (tuple, list)) else value
    return values


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(isinstance(item, _PLAIN) for item in value)
    return isinstance(value, _PLAIN)


def _shapes(module: nn.Module, prefix: str = "") -> Shapes:
    state = module.state_dict(prefix=prefix)
    return {name: tuple(t.shape) for name, t in state.items() if isinstance(t, torch.Tensor)}


def _first_difference(a: Shapes, b: Shapes) -> str | None:
    return next((name for name in [*a, *b] if a.get(name) != b.get(name)), None)


def export_of(
    after: Sequence[Site], shapes: Shapes, patch: Mapping[str, Any], twins: Twins
) -> Export:
    """Native, if a model built from the patched config alone has the result's very shapes."""
    twin = twins.of(patch)
    other = _first_difference(shapes, _shapes(twin))
    if other is None and find_sites(twin).sites == tuple(after):
        return Export("native", "the architecture's own config says the result", ("transformers",))
    counts = sorted({site.kv_heads for site in after})
    kind = twin.config.model_type
    if len(counts) > 1:
        reason = (
            f"{kind} configs hold one KV head count for all layers; "
            f"the result has {', '.join(map(str, counts))}"
        )
    else:
        reason = f"a {kind} config does not say the result: a fresh model differs in {other}"
    return Export("none", reason, ())
