"""The cells of the grid, and the order in which they are worth having."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

ORIGINAL = "original"  # in place of an estimator: the model as it is
REFERENCE = "leave_one_out"
ESTIMATORS = ("leave_one_out", "gate_gradient", "output_norm", "random")
SCOPES = ("global", "layer")
SCORE, PRUNE = "score", "prune"


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        unit: what is scored and pruned: ``heads`` or ``groups``; empty for the original.
        what: `SCORE`, the estimator's table and its cost; or `PRUNE`, the loss afterwards.
        estimator: whose scores, or `ORIGINAL`.
        seed: of the windows that were looked at, and of what is random.
        scope: of `prune_heads`; empty unless pruned.
        amount: of `prune_heads`.
        healed: whether a few steps of distillation came after.
    """

    kind: str
    unit: str
    what: str
    estimator: str
    seed: int
    scope: str = ""
    amount: float = 0.0
    healed: bool = False

    @property
    def key(self) -> str:
        words = [self.kind, self.unit, self.what, f"{self.estimator}-{self.seed}"]
        if self.scope:
            words += [self.scope, f"{self.amount:.0%}", "healed" if self.healed else "as cut"]
        return " ".join(word for word in words if word)

    @property
    def scores(self) -> Cell:
        """The cell whose scores this one cuts by."""
        return Cell(self.kind, self.unit, SCORE, self.estimator, self.seed)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Cell:
        """The cell that a record of the store is about."""
        return cls(**{name: record[name] for name in cls.__dataclass_fields__})


def original(kind: str) -> Cell:
    return Cell(kind, "", PRUNE, ORIGINAL, 0)


def cells(
    units: Mapping[str, Sequence[str]],
    estimators: Sequence[str],
    seeds: Sequence[int],
    scopes: Sequence[str],
    amounts: Sequence[float],
    *,
    healed: bool = True,
) -> list[Cell]:
    """What is asked for, with the originals it is compared with; best first.

    Healing is for scope `global` alone.

    Args:
        units: model → its units.
    """
    found = [original(kind) for kind in units]
    for kind, of_kind in units.items():
        for unit in of_kind:
            for estimator in estimators:
                for seed in seeds:
                    found.append(Cell(kind, unit, SCORE, estimator, seed))
                    found += [
                        Cell(kind, unit, PRUNE, estimator, seed, scope, amount, after)
                        for scope in scopes
                        for amount in amounts
                        for after in ((False, True) if healed and scope == "global" else (False,))
                    ]
    kinds = list(units)
    return sorted(found, key=lambda cell: _rank(cell, kinds))


def _rank(cell: Cell, kinds: Sequence[str]) -> tuple[Any, ...]:
    """Originals, scores, then what needs no training: the first seed and scope `global` before the
    rest; then what is healed, 40% first, since that is what recipes cut.
    """
    model = (kinds.index(cell.kind), cell.unit)
    if cell.estimator == ORIGINAL:
        return (0, 0, 0, 0, *model)
    estimator = ESTIMATORS.index(cell.estimator)
    if cell.what == SCORE:
        return (1, cell.seed, 0, 0, *model, estimator)
    if not cell.healed:
        return (2, cell.seed, SCOPES.index(cell.scope), 0, *model, cell.amount, estimator)
    middle = round(100 * abs(cell.amount - 0.4))
    return (3, cell.seed, middle, 0, *model, cell.amount, estimator)
