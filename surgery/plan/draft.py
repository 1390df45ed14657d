"""An unfinished plan, to which one operation after the other adds what it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from surgery.models.attributes import Attributes
from surgery.models.config import apply_patch
from surgery.models.reference import ReferenceModels
from surgery.models.sites import Site
from surgery.plan.resolution import Resolution
from surgery.transforms.edits import SiteChange


@dataclass(frozen=True)
class Step:
    """A change to a live model that is neither a tensor edit nor an attribute.

    Attributes:
        operation: name of the operation that adds it.
        kind: a name in that operation's `steps`.
        arguments: its keyword arguments, plain JSON.
        recorded: whether it must be done again when the result is reloaded, since neither the
            tensors nor the architecture's config hold it.
    """

    operation: str
    kind: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    recorded: bool = False


@dataclass(frozen=True)
class PlanContext:
    """What an operation may use besides the model.

    Attributes:
        seed: the run's seed, for operations that draw.
        initializer_range: standard deviation with which the architecture initialises matrices.
        device: where the model will run (``cpu``, ``cuda:0``, …), for operations that choose code.
        native: whether the architecture's own config must be able to describe the result.
        tokens: length at which sizes are counted.
        value_bytes: of a cached value.
    """

    seed: int
    initializer_range: float
    device: str = "cpu"
    native: bool = False
    tokens: int = 512
    value_bytes: int = 2


@dataclass
class Draft:
    """An unfinished plan: what the operations so far have added.

    Attributes:
        sites: the model's sites.
        config: a copy of the model's config, with every patch so far applied; read-only.
        model: the model before the changes, for reading its class, modules and dtype; it may live
            on the meta device.
        references: of that model.
        changes: tensor edits, in order.
        patch: dotted config keys and their new values.
        set_by: operation number → the keys that it set.
        attributes_by: operation number → path and name of the attributes that it set.
        steps: in order; performed after all tensor edits.
        notes: sentences a person should read with the plan.
        removed: paths of sites whose attention is removed completely.
        implementation: the attention implementation that the result runs with.
        layers: site path → column → text, for tables.
        number: of the operation that is planned, from 0.
        name: of that operation.
        resolution: what calibration decided for that operation; ``None`` before it has.
        open_decisions: sentences about what calibration has to decide.
        tensors: made by calibration, by the names that edits use.
    """

    sites: list[Site]
    config: Any
    model: PreTrainedModel
    references: ReferenceModels
    context: PlanContext
    changes: list[SiteChange] = field(default_factory=list)
    patch: dict[str, Any] = field(default_factory=dict)
    set_by: dict[int, dict[str, Any]] = field(default_factory=dict)
    attributes_by: dict[int, set[tuple[str, str]]] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    removed: set[str] = field(default_factory=set)
    implementation: str = ""
    layers: dict[str, dict[str, str]] = field(default_factory=dict)
    number: int = 0
    name: str = ""
    resolution: Resolution | None = None
    open_decisions: list[str] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    _own: Attributes = field(default_factory=dict)

    def add_changes(self, changes: Sequence[SiteChange]) -> None:
        """Add changes to the tensors of some sites."""
        for change in changes:
            self.sites[change.before.layer] = change.after
        self.changes += changes

    def set_config(self, key: str, value: Any) -> None:
        """Set a dotted config key of the result.

        What follows from it on the live model is found automatically: see `find_attributes`.
        """
        self.patch[key] = value
        self.set_by.setdefault(self.number, {})[key] = value
        apply_patch(self.config, {key: value})

    def set_attribute(self, path: str, name: str, value: Any) -> None:
        """Set an attribute of a module of the result, where no config key sets it."""
        self._own.setdefault(path, {})[name] = value
        self.attributes_by.setdefault(self.number, set()).add((path, name))

    def add_step(self, kind: str, arguments: Mapping[str, Any], *, recorded: bool = False) -> None:
        """Add a step of the operation that is planned."""
        self.steps.append(Step(self.name, kind, arguments, recorded))

    def set_cell(self, path: str, column: str, text: str) -> None:
        """Set the text that tables show for a site in a column, in place of an earlier one."""
        self.layers.setdefault(path, {})[column] = text

    def find_attributes(self) -> Attributes:
        """Find where the result differs from the model: module path → attribute → value.

        These are the attributes that follow from the patched config, and those of `set_attribute`.

        Raises:
            ConfigError: the architecture does not accept the patched config.
        """
        found = {
            path: dict(held) for path, held in self.references.find_attributes(self.patch).items()
        }
        for path, values in self._own.items():
            found.setdefault(path, {}).update(values)
        return found

    def get_value(self, path: str, name: str) -> Any:
        """Get an attribute of a module in the result so far; ``None`` if it does not have it."""
        planned = self.find_attributes().get(path, {})
        if name in planned:
            return planned[name]
        module: nn.Module = self.model.get_submodule(path)
        return getattr(module, name, None)
