"""What an operation is to a plan: options, and what they add to a plan in the making."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, ClassVar

import torch

from surgery.anatomy import Site
from surgery.architecture.config_patch import apply_patch
from surgery.plan.edits import SiteChange
from surgery.plan.resolution import Resolution


@dataclass
class Operation(ABC):
    """A declared change. Subclasses are dataclasses: their fields are the config keys."""

    name: ClassVar[str]

    @abstractmethod
    def plan(self, draft: Draft) -> None:
        """Add to `draft` what it does to the model as the operations before it left it.

        Raises:
            ConfigError: it cannot be done to this model.
        """

    def rehousing(self, config: Any) -> dict[str, Any] | None:
        """Arguments of `surgery.rehouse.rehouse`, for operations that need another architecture.

        Such an operation comes first: the others are planned on the model it leads to.
        """
        return None

    @property
    def calibrated(self) -> bool:
        """Whether it leaves decisions to calibration, which gives the plan a `Resolution`."""
        return False

    def to_json(self) -> dict[str, Any]:
        spec = {field.name: getattr(self, field.name) for field in fields(self)}
        plain = {k: v.value if isinstance(v, Enum) else v for k, v in spec.items()}
        return {"operation": self.name, **plain}

    def key(self, field: str) -> str:
        """The config key of a field, for messages."""
        return f"attention.{self.name}.{field}"


@dataclass(frozen=True)
class PlanContext:
    """What an operation may know beyond the model.

    Attributes:
        seed: the run's seed, for operations that draw.
        initializer_range: standard deviation with which the architecture initialises matrices.
        device: where the model will run (``cpu``, ``cuda:0``, …), for operations that choose code.
        native: whether the architecture's own config must be able to say the result.
    """

    seed: int
    initializer_range: float
    device: str = "cpu"
    native: bool = False


@dataclass(frozen=True)
class Step:
    """One thing that is done to a live model and is no tensor edit.

    Attributes:
        operation: the operation that asks for it.
        kind: a name in `surgery.execute.steps`.
        arguments: its keyword arguments, plain JSON.
        recorded: whether the result must be told of it when reloaded, since neither its tensors
            nor the architecture's config say it.
    """

    operation: str
    kind: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    recorded: bool = False


@dataclass
class Draft:
    """A plan in the making, as the operations so far left it.

    Attributes:
        sites: the model's sites.
        config: a copy of the model's config, with every patch so far applied; for reading.
        skeleton: the model before the changes, for reading its class, modules and dtype.
        changes: tensor edits, in order.
        patch: dotted config keys and their new values.
        steps: in order; performed after all tensor edits.
        notes: sentences a person should read with the plan.
        removed: paths of sites whose attention goes altogether.
        number: of the operation that is planned, from 0.
        resolution: what calibration decided for that operation; ``None`` before it has.
        open_decisions: sentences about what only calibration can decide.
        tensors: what calibration made, by the names that edits use.
    """

    sites: list[Site]
    config: Any
    skeleton: Any
    context: PlanContext
    changes: list[SiteChange] = field(default_factory=list)
    patch: dict[str, Any] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    removed: set[str] = field(default_factory=set)
    number: int = 0
    resolution: Resolution | None = None
    open_decisions: list[str] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def change(self, changes: Sequence[SiteChange]) -> None:
        """Add what happens to the tensors of some sites."""
        for change in changes:
            self.sites[change.before.layer] = change.after
        self.changes += changes

    def set_config(self, key: str, value: Any) -> None:
        """Say that the result's config holds `value` under the dotted `key`."""
        self.patch[key] = value
        apply_patch(self.config, {key: value})
