"""`absolute_to_rope`: rotary positions (arXiv:2104.09864), or none, in place of learned ones."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from surgery.errors import ConfigError
from surgery.operations.base import operation
from surgery.operations.rehouse import check_first
from surgery.plan.operation import Draft, Operation

_THETA = 10000.0
_HOUSE = "starcoder2"  # the same blocks as GPT-2's and OPT's, and rotary


class Rotary(Enum):
    """What stands in for the table: RoPE, or nothing at all (NoPE, arXiv:2305.19466)."""

    default = "default"
    none = "none"


@operation("absolute_to_rope")
@dataclass
class AbsoluteToRope(Operation):
    """Options of `attention.absolute_to_rope`.

    The table of learned positions is left behind, so the model has to be trained afterwards.
    `max_position_embeddings` stays what it was.

    Attributes:
        theta: base of the rotary frequencies; not used with ``none``.
        type: RoPE, or no positions.
    """

    theta: float = _THETA
    type: Rotary = Rotary.default

    def plan(self, draft: Draft) -> None:
        check_first(self.name, draft)
        instead = "none" if self.type is Rotary.none else f"RoPE with base {self.theta:g}"
        draft.notes.append(
            f"positions: {instead} in place of the learned table, which is left behind; "
            "the model has to be trained to it"
        )

    def rehousing(self, config: Any) -> dict[str, Any]:
        """Keyword arguments of `surgery.rehouse.rehouse`, plain JSON."""
        if self.type is Rotary.none:
            if self.theta != _THETA:
                raise ConfigError(
                    self.key("theta"),
                    "type none has no use for it",
                    given=self.theta,
                    valid=f"{_THETA}, which is not looked at, or type default",
                )
            return {"into": _HOUSE, "positions": {"nope": True}}
        if not self.theta > 1:
            raise ConfigError(
                self.key("theta"),
                "is no base of rotary frequencies",
                given=self.theta,
                valid="a number above 1",
            )
        return {"into": _HOUSE, "positions": {"theta": self.theta}}
