"""What is derived from the cells: gaps, shares of gaps, medians, targets. Nothing is clamped.

Terms, per model and seed:
- gap: loss - loss of the original, on the same windows (nats/token).
- control: the original itself trained on with objective lm for as many tokens; with no training,
  the original. `*_control` figures are taken against it.
- share of mean's gap: gap / gap of merge `mean` at the same ratio, tokens and objective.
- closed: 1 - gap / gap of `mean` at the same ratio with no training.
Over seeds, then over models: medians. ``None``: a part is missing, or the gap to compare with is
no gap (zero or less).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from benchmarks.merge_quality.grid import LONG, MAIN_RATIO, NO_TRAINING, ORIGINAL, WHOLE, Cell
from benchmarks.merge_quality.rates import best
from benchmarks.shared.weights import check_weights

Record = Mapping[str, Any]
Figures = dict[str, float | None]

MEASURED = ("loss", "kl", "agreement", "entropy")
AGAINST = {"": "the original", "_control": "the control"}


def derive(records: Iterable[Record]) -> dict[str, Any]:
    """{"groups": one per merge, ratio, share and objective, each with medians; "targets": …}.

    Where healing rates were tried, "at_best" holds the same of every merge, and of the control, at
    the rate that suits it best; "chosen" in it are the cells with their rates.

    Raises:
        MixedWeightsError: see there.
    """
    found = {Cell.of(record): record for record in records}
    check_weights((f"{cell.kind}-{cell.seed}", record["weights"]) for cell, record in found.items())
    rated = {cell: record for cell, record in found.items() if cell.rate is not None}
    plain = {cell: record for cell, record in found.items() if cell.rate is None}
    if not rated:
        return _derived(plain)
    untrained = {cell: record for cell, record in plain.items() if not cell.share}
    chosen = best(rated)
    at_best = _derived(untrained | chosen)
    at_best = {name: [x for x in found if x["share"]] for name, found in at_best.items()}
    at_best["chosen"] = [Cell.of(record).to_json() for record in chosen.values()]
    return _derived(plain) | {"at_best": at_best}


def _derived(found: Mapping[Cell, Record]) -> dict[str, Any]:
    per_group: dict[Cell, dict[str, dict[int, Figures]]] = {}
    for cell in found:
        group = replace(cell, kind="", seed=0)
        per_kind = per_group.setdefault(group, {}).setdefault(cell.kind, {})
        per_kind[cell.seed] = of_cell(found, cell)
    groups = [_group(group, per_kind) for group, per_kind in per_group.items()]
    return {"groups": groups, "targets": targets(groups)}


def of_cell(found: Mapping[Cell, Record], cell: Cell) -> Figures:
    """The figures of one cell."""

    def loss(**other: Any) -> float | None:
        record = found.get(replace(cell, **other))
        return None if record is None else float(record["loss"])

    mine = loss()
    original = loss(merge=ORIGINAL, ratio=WHOLE, share=0.0, objective=NO_TRAINING)
    control = original
    if cell.share:
        control = loss(merge=ORIGINAL, ratio=WHOLE, objective="lm")
    untrained = _minus(loss(merge="mean", share=0.0, objective=NO_TRAINING), original)
    figures: Figures = {name: float(found[cell][name]) for name in MEASURED}
    for suffix, base in (("", original), ("_control", control)):
        gap = _minus(mine, base)
        figures[f"gap{suffix}"] = gap
        for other in ("mean", "aligned_renorm"):
            name = f"share_of_{other}{suffix}"
            figures[name] = _over(gap, _minus(loss(merge=other), base))
        remaining = _over(gap, untrained)
        figures[f"remaining{suffix}"] = remaining
        figures[f"closed{suffix}"] = None if remaining is None else 1 - remaining
    mean = found.get(replace(cell, merge="mean"))
    figures["kl_share_of_mean"] = None if mean is None else _over(figures["kl"], mean["kl"])
    return figures


def targets(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The claims made for `optimal`, each with what came out; `reached` is None if nothing did."""
    found = [
        _target(
            groups,
            "gap with no training, as a share of mean's",
            "share_of_mean",
            0.0,
            NO_TRAINING,
            at_most=1 / 6,
        ),
        _target(
            groups,
            "gap with no training, as a share of aligned_renorm's",
            "share_of_aligned_renorm",
            0.0,
            NO_TRAINING,
            at_most=1 / 3,
        ),
    ]
    for objective in ("distill", "lm"):
        for suffix, against in AGAINST.items():
            found += [
                _target(
                    groups,
                    f"of mean's untrained gap closed after 5%, {objective}, against {against}",
                    f"closed{suffix}",
                    LONG,
                    objective,
                    at_least=0.97,
                ),
                _target(
                    groups,
                    f"gap left after 5%, as a share of mean's, {objective}, against {against}",
                    f"share_of_mean{suffix}",
                    LONG,
                    objective,
                    at_most=1 / 5,
                ),
            ]
    return found


def times_smaller(share: float | None) -> float | None:
    """The same the other way about; ``None`` where nothing (or less) is left."""
    return 1 / share if share is not None and share > 0 else None


def find(
    groups: Sequence[Mapping[str, Any]], merge: str, ratio: str, share: float, objective: str
) -> Mapping[str, Any] | None:
    wanted = {"merge": merge, "ratio": ratio, "share": share, "objective": objective}
    for group in groups:
        if all(group[name] == value for name, value in wanted.items()):
            return group
    return None


def _target(
    groups: Sequence[Mapping[str, Any]],
    what: str,
    figure: str,
    share: float,
    objective: str,
    *,
    at_most: float | None = None,
    at_least: float | None = None,
) -> dict[str, Any]:
    group = find(groups, "optimal", MAIN_RATIO, share, objective)
    per_kind = {} if group is None else {k: v[figure] for k, v in group["kinds"].items()}
    value = None if group is None else group["all"][figure]
    reached = None
    if value is not None:
        reached = value <= at_most if at_most is not None else value >= (at_least or 0)
    return {
        "what": what,
        "figure": figure,
        "ratio": MAIN_RATIO,
        "share": share,
        "objective": objective,
        "at_most": at_most,
        "at_least": at_least,
        "kinds": per_kind,
        "median": value,
        "reached": reached,
    }


def _group(group: Cell, per_kind: Mapping[str, Mapping[int, Figures]]) -> dict[str, Any]:
    names = next(iter(next(iter(per_kind.values())).values()))
    kinds = {
        kind: {name: _median(figures[name] for figures in seeds.values()) for name in names}
        for kind, seeds in per_kind.items()
    }
    spread = {
        kind: {name: _range(figures[name] for figures in seeds.values()) for name in names}
        for kind, seeds in per_kind.items()
    }
    return {
        "merge": group.merge,
        "ratio": group.ratio,
        "share": group.share,
        "objective": group.objective,
        "seeds": {kind: sorted(seeds) for kind, seeds in per_kind.items()},
        "all": {name: _median(figures[name] for figures in kinds.values()) for name in names},
        "kinds": kinds,
        "spread": spread,
    }


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _over(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None or b <= 0 else a / b


def _median(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return median(there) if there else None


def _range(values: Iterable[float | None]) -> list[float] | None:
    there = [value for value in values if value is not None]
    return [min(there), max(there)] if there else None
