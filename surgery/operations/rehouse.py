"""`rehouse` and `absolute_to_rope`: the same model in another architecture.

`rehouse` keeps what the model computes; `absolute_to_rope` replaces its learned positions by
rotary ones (arXiv:2104.09864), or by none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING
from transformers import PreTrainedModel

from surgery.config.options import Range, option
from surgery.errors import ConfigError, ConversionError
from surgery.models.convert import TARGETS
from surgery.plan.draft import Draft
from surgery.plan.operation import Conversion, Operation, Position

_THETA = 10000.0
_TARGET = "starcoder2"  # the same blocks as GPT-2's and OPT's, and rotary


@dataclass
class Rehouse(Operation):
    """Options of `attention.rehouse`.

    Attributes:
        into: the architecture. `surgery.models.convert.list_targets` lists those that can
            hold a model exactly.
    """

    name = "rehouse"
    position = Position.FIRST

    into: str = option(
        MISSING, f"the architecture: {' | '.join(TARGETS)}", valid=", ".join(TARGETS)
    )

    def choose_conversion(self, model: PreTrainedModel) -> Conversion:
        if self.into not in TARGETS:
            raise ConfigError(
                self.get_key("into"),
                "no model can be converted to this architecture",
                given=self.into,
                valid=TARGETS,
            )
        return Conversion(self.into)

    def explain_conversion_error(self, error: ConversionError) -> ConfigError:
        learned = "; for learned positions: attention.absolute_to_rope"
        hint = learned if "learned positions" in error.problem else ""
        return ConfigError(
            self.get_key("into"),
            error.problem,
            given=error.given,
            valid=f"{_join_valid(error.valid)}{hint}",
        )

    def plan(self, draft: Draft) -> None:
        """Add nothing besides the conversion."""


def _join_valid(valid: str | Iterable[str]) -> str:
    return valid if isinstance(valid, str) else ", ".join(valid)


class Rotary(Enum):
    """What replaces the table: RoPE, or nothing (NoPE, arXiv:2305.19466)."""

    default = "default"
    none = "none"


@dataclass
class AbsoluteToRope(Operation):
    """Options of `attention.absolute_to_rope`.

    The table of learned positions is removed, so the model has to be trained afterwards.
    `max_position_embeddings` stays what it was.

    Attributes:
        theta: base of the rotary frequencies; not used with ``none``.
        type: RoPE, or no positions.
    """

    name = "absolute_to_rope"
    position = Position.FIRST

    theta: float = option(
        _THETA, "base of the rotary frequencies", range=Range(low=1, low_open=True)
    )
    type: Rotary = option(
        Rotary.default,
        "default: RoPE | none: NoPE (Kazemnejad et al. 2023), without theta",
    )

    def choose_conversion(self, model: PreTrainedModel) -> Conversion:
        if self.type is Rotary.default:
            return Conversion(_TARGET, {"theta": self.theta})
        if self.theta != _THETA:
            raise ConfigError(
                self.get_key("theta"),
                "type none does not use it",
                given=self.theta,
                valid=f"{_THETA}, which has no effect, or type default",
            )
        return Conversion(_TARGET, {"nope": True})

    def plan(self, draft: Draft) -> None:
        rotary = self.type is Rotary.default
        instead = f"RoPE with base {self.theta:g}" if rotary else "none"
        draft.notes.append(
            f"positions: {instead} in place of the learned table, which is removed; "
            "the model has to be trained afterwards"
        )
        for site in draft.sites:
            draft.set_cell(
                site.path, "positions", f"{'rotary' if rotary else 'none'}, were absolute"
            )
