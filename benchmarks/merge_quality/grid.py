"""The cells of the grid, and the order in which they are worth having."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

ORIGINAL = "original"  # in place of a merge: no surgery; healed, it is the control
WHOLE = "1:1"
NO_TRAINING = "none"
MERGES = ("mean", "first", "aligned", "aligned_renorm", "optimal")
RATIOS = ("2:1", "4:1", "MQA")
SHARES = (0.0, 0.01, 0.05)
OBJECTIVES = ("lm", "distill")
MAIN_MERGES = ("mean", "optimal")  # what the targets compare

MAIN_RATIO, LONG = "4:1", 0.05  # where the targets are
_FIRST = (ORIGINAL, "mean", "optimal", "aligned_renorm")


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        merge: how, or `ORIGINAL`.
        ratio: query heads per KV head, or MQA for one KV head.
        share: of the model's own training tokens, spent on healing.
        objective: of healing; `NO_TRAINING` where `share` is 0.
        rate: of healing, as a multiple of the project's default; ``None``: the preset's.
    """

    kind: str
    seed: int
    merge: str
    ratio: str
    share: float
    objective: str
    rate: float | None = None

    @property
    def key(self) -> str:
        name = f"{self.kind}-{self.seed} {self.merge} {self.ratio} {self.share:.0%}"
        return f"{name} {self.objective}" + ("" if self.rate is None else f" at {self.rate:g}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Cell:
        """The cell that a record of the store is about."""
        return cls(**{name: record[name] for name in cls.__dataclass_fields__ if name in record})


def kv_heads(ratio: str, heads: int) -> int:
    return {WHOLE: heads, "MQA": 1}.get(ratio) or heads // int(ratio.split(":")[0])


def cells(
    kinds: Sequence[str],
    seeds: Sequence[int],
    merges: Sequence[str],
    ratios: Sequence[str],
    shares: Sequence[float],
    objectives: Sequence[str],
    healed_seeds: Sequence[int] | None = None,
) -> list[Cell]:
    """What is asked for, with the originals and the controls it is compared with; best first.

    Args:
        healed_seeds: those that are trained as well; ``None``: all.
    """
    found: list[Cell] = []
    for kind in kinds:
        for seed in seeds:
            trained = [s for s in shares if s and (healed_seeds is None or seed in healed_seeds)]
            found.append(Cell(kind, seed, ORIGINAL, WHOLE, 0.0, NO_TRAINING))
            found += [Cell(kind, seed, ORIGINAL, WHOLE, share, "lm") for share in trained]
            for merge in merges:
                for ratio in ratios:
                    if 0.0 in shares:
                        found.append(Cell(kind, seed, merge, ratio, 0.0, NO_TRAINING))
                    found += [
                        Cell(kind, seed, merge, ratio, share, objective)
                        for share in trained
                        for objective in objectives
                    ]
    return sorted(found, key=lambda cell: _rank(cell, kinds))


def rated(
    kinds: Sequence[str],
    seeds: Sequence[int],
    merges: Sequence[str],
    objectives: Sequence[str],
    rates: Sequence[float],
) -> list[Cell]:
    """What the targets are about, healed at every one of `rates`, and the controls as well."""
    return [
        Cell(kind, seed, merge, WHOLE if merge == ORIGINAL else MAIN_RATIO, LONG, objective, rate)
        for seed in seeds
        for kind in kinds
        for merge in (ORIGINAL, *merges)
        for objective in (("lm",) if merge == ORIGINAL else objectives)
        for rate in rates
    ]


def _rank(cell: Cell, kinds: Sequence[str]) -> tuple[int, ...]:
    """No training; then 4:1, 5% before 1%, distill before lm; then the rest alike."""
    main = cell.ratio in (MAIN_RATIO, WHOLE)
    ratio = (MAIN_RATIO, "2:1", "MQA").index(cell.ratio) if cell.ratio != WHOLE else 0
    merge = (ORIGINAL, "mean", "optimal", "aligned_renorm", "aligned", "first").index(cell.merge)
    model = (cell.seed, kinds.index(cell.kind))
    if not cell.share:
        return (0, 0, 0, 0, *model, ratio if cell.merge != ORIGINAL else -1, merge)
    later = int(cell.merge not in _FIRST)
    by_share = -round(1000 * cell.share)
    if main:
        return (1, by_share, later, int(cell.objective == "lm"), *model, ratio, merge)
    return (2, by_share, later, int(cell.objective == "lm"), *model, ratio, merge)
