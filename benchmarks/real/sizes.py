"""How much text each row sees."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """Windows and tokens.

    Attributes:
        seq_len: of the held-out windows, the same for all rows but those on longer contexts.
        held_out: windows.
        many, few: (windows, tokens of each) that a merge is calibrated on.
        scored: windows that heads are scored on by estimators that need no pass per head.
        left_out: windows for leave one out, which does.
        refitted: windows for pruning's output projections.
        batch: windows of `seq_len` in a step of healing.
        healed: tokens of healing after a merge.
        healed_pruned: the same after pruning.
        compared: tokens of healing where objectives are compared.
        rated: tokens of healing where learning rates are compared.
        extended: times that the context becomes longer.
        analyzed: windows that roles are read from.
        probed: texts per probe.
        pairs: of steps with and without monitors.
    """

    seq_len: int = 512
    held_out: int = 24
    many: tuple[int, int] = (64, 512)
    few: tuple[int, int] = (8, 256)
    scored: int = 16
    left_out: int = 4
    refitted: int = 24
    batch: int = 2
    healed: int = 500_000
    healed_pruned: int = 300_000
    compared: int = 100_000
    rated: int = 60_000
    extended: int = 4
    analyzed: int = 16
    probed: int = 64
    pairs: int = 6

    def count_steps(self, tokens: int) -> int:
        """Count the whole steps that fit into so many tokens."""
        return max(1, tokens // (self.batch * self.seq_len))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


FULL = Sizes()
# To see that all rows run: seconds each on a model of a few million parameters.
QUICK = Sizes(
    seq_len=64,
    held_out=4,
    many=(8, 64),
    few=(4, 32),
    scored=4,
    left_out=2,
    refitted=4,
    healed=512,
    healed_pruned=512,
    compared=256,
    rated=256,
    extended=2,
    analyzed=4,
    probed=8,
    pairs=2,
)
