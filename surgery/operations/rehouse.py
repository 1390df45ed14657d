"""`rehouse`: the same model in another architecture, whose config can say more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from surgery.errors import ConfigError
from surgery.operations.base import operation
from surgery.plan.operation import Draft, Operation

HOUSES = ("mistral", "phi3", "starcoder2")


@operation("rehouse")
@dataclass
class Rehouse(Operation):
    """Options of `attention.rehouse`.

    Attributes:
        into: the architecture, one of `HOUSES`. Which of them can hold a model exactly is told by
            `surgery.rehouse.houses`.
    """

    into: str = MISSING

    def plan(self, draft: Draft) -> None:
        check_first(self.name, draft)

    def rehousing(self, config: Any) -> dict[str, Any]:
        """Keyword arguments of `surgery.rehouse.rehouse`, plain JSON."""
        if self.into not in HOUSES:
            raise ConfigError(self.key("into"), "no such house", given=self.into, valid=HOUSES)
        return {"into": self.into, "positions": None}


def check_first(name: str, draft: Draft) -> None:
    """Refuse to move a model that other operations were planned for already.

    Raises:
        ConfigError: something comes before.
    """
    if draft.changes or draft.steps or draft.patch:
        raise ConfigError(
            f"attention.{name}",
            "has to come first: the others work on what it gives",
            valid=f"attention=[{name},…]",
        )
