"""What an operation is to a plan: options, and the changes they mean at each site."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, ClassVar

from surgery.anatomy import Site
from surgery.plan.edits import SiteChange


@dataclass
class Operation(ABC):
    """A declared change. Subclasses are dataclasses: their fields are the config keys."""

    name: ClassVar[str]

    @abstractmethod
    def changes(self, sites: Sequence[Site], context: PlanContext) -> list[SiteChange]:
        """What it does to each site it changes; sites it leaves alone are not listed.

        Raises:
            ConfigError: it cannot be done to these sites.
        """

    def to_json(self) -> dict[str, Any]:
        spec = {field.name: getattr(self, field.name) for field in fields(self)}
        plain = {k: v.value if isinstance(v, Enum) else v for k, v in spec.items()}
        return {"operation": self.name, **plain}

    def key(self, field: str) -> str:
        """The config key of a field, for messages."""
        return f"attention.{self.name}.{field}"


@dataclass(frozen=True)
class PlanContext:
    """What an operation may know beyond the sites.

    Attributes:
        seed: the run's seed, for operations that draw.
        initializer_range: standard deviation with which the architecture initialises matrices.
    """

    seed: int
    initializer_range: float
