"""The page's section on healing rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from benchmarks.merge_quality.grid import LONG, MAIN_RATIO, NO_TRAINING, ORIGINAL, WHOLE, Cell
from benchmarks.merge_quality.targets_page import targets_table
from benchmarks.shared.markdown import NOTHING, table

_HEAD = f"""\
## At the healing rate that suits each best

One rate for a merge on all models need not be what suits it best on each. So the cells that the
targets are about ({MAIN_RATIO}, {LONG:.0%}) were healed at other rates too. Of each merge, and of
the control, that rate counts which leaves the least loss on as many *other* held-out windows, per
model and objective. The gaps to the original below, and the targets, are on the windows that all
figures come from and that chose nothing; so the one in bold, which counts, need not be the least.
Where it is at an end of what was tried ({NOTHING}: not tried), there may be better beyond.

    python -m benchmarks.merge_quality --rates {{rates}}
"""


def rates_section(figures: Mapping[str, Any]) -> list[str]:
    """Gaps by rate, then the targets of healing with the best of them."""
    found = {Cell.of(record): record["loss"] for record in figures["cells"]}
    rates = sorted({cell.rate for cell in found if cell.rate is not None}, reverse=True)
    rows = []
    for chosen in sorted(map(Cell.of, figures["at_best"]["chosen"]), key=lambda cell: cell.key):
        original = found[Cell(chosen.kind, chosen.seed, ORIGINAL, WHOLE, 0.0, NO_TRAINING)]
        row = [chosen.kind, str(chosen.seed), chosen.merge, chosen.objective]
        for rate in rates:
            cell = replace(chosen, rate=rate)
            gap = f"{found[cell] - original:.4f}" if cell in found else NOTHING
            row.append(f"**{gap}**" if cell == chosen else gap)
        rows.append(row)
    head = ["model", "seed", "merge", "objective", *(f"gap at {rate:g}" for rate in rates)]
    return [
        _HEAD.format(rates=" ".join(f"{rate:g}" for rate in rates)),
        *table(head, rows),
        "",
        targets_table(figures["at_best"]["targets"]),
    ]
