"""What is derived from the cells: agreement with leave-one-out, cost, losses after pruning.

Per case, a model and what of it is cut:
- rank correlation: Spearman's, of all scores with leave-one-out's on the same windows; `within`:
  of each layer's own, a mean over layers of three and more.
- top, low: of the quarter that one holds highest (lowest), the share that the other does, too.
- again: rank correlation of an estimator with itself on the windows of another seed.
- noise: standard error of a score over batches, a median over heads, as a share of the standard
  deviation of scores over heads.
- cost: seconds, as a multiple of one forward pass over the same windows in the same process.
- gap: loss - loss of the original, on the same held-out text. Mean gap: over the shares at which
  every estimator was measured.
- left: mean gap after healing as a share of that before, over shares where both are known.
Over seeds: medians, and the lowest and highest. ``None``: a part is missing, or no number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from statistics import median
from typing import Any

from benchmarks.importance.grid import ESTIMATORS, ORIGINAL, PRUNE, REFERENCE, SCORE, Cell
from benchmarks.importance.ranks import overlap, spread
from benchmarks.shared.weights import check_weights
from surgery.lab.tasks.agreement import compute_spearman

Record = Mapping[str, Any]
Spread = dict[str, float] | None

# How heads went: name → (scope, healed).
RUNS = {"global": ("global", False), "layer": ("layer", False), "healed": ("global", True)}
TOP = 0.25


def derive(records: Iterable[Record]) -> dict[str, Any]:
    """{"cases": […], "wins": …, "overall": …, "foresight": …}.

    Raises:
        MixedWeightsError: see there.
    """
    found = {Cell.of(record): record for record in records}
    check_weights((cell.kind, record["weights"]) for cell, record in found.items())
    named = dict.fromkeys((c.kind, c.unit) for c in found if c.estimator != ORIGINAL)
    cases = [_case(found, kind, unit) for kind, unit in named]
    return {
        "cases": cases,
        "wins": {run: wins(cases, run) for run in RUNS},
        "overall": {name: _overall(cases, name) for name in ESTIMATORS},
        "foresight": foresight(cases),
        "scopes": {name: _scopes(cases, name) for name in ESTIMATORS},
    }


def wins(cases: Sequence[Mapping[str, Any]], run: str) -> dict[str, Any]:
    """How often each estimator's cut lost least, of all shares of all cases where every estimator
    was measured; a tie is everybody's who shares it.
    """
    count = dict.fromkeys(ESTIMATORS, 0)
    shares = 0
    for case in cases:
        for amount in case["complete"][run]:
            gaps = {
                name: point["gap"]["median"]
                for name in ESTIMATORS
                for point in case["pruning"][run][name]
                if point["amount"] == amount
            }
            if len(gaps) == len(ESTIMATORS):
                shares += 1
                for name, gap in gaps.items():
                    count[name] += gap == min(gaps.values())
    return {"of": shares, "estimators": count}


def foresight(cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Whether an estimator that agrees with leave-one-out prunes well: over cases and the other
    estimators, the rank correlation of agreement with the mean gap as a share of random's.
    """
    found: dict[str, Any] = {}
    for run in RUNS:
        pairs = [
            (case["agreement"][name]["all"]["median"], case["share_of_random"][run][name])
            for case in cases
            for name in ESTIMATORS
            if name not in (REFERENCE, "random")
            and case["agreement"][name]["all"] is not None
            and case["share_of_random"][run][name] is not None
        ]
        found[run] = {
            "pairs": len(pairs),
            "spearman": compute_spearman(*zip(*pairs, strict=True)) if len(pairs) > 2 else None,
        }
    return found


def _case(found: Mapping[Cell, Record], kind: str, unit: str) -> dict[str, Any]:
    mine = {c: r for c, r in found.items() if (c.kind, c.unit) == (kind, unit)}
    tables = {
        (c.estimator, c.seed): record["scores"] for c, record in mine.items() if c.what == SCORE
    }
    original = found.get(Cell(kind, "", PRUNE, ORIGINAL, 0))
    base = None if original is None else float(original["loss"])
    pruning = {
        run: {name: _curve(mine, name, scope, healed, base) for name in ESTIMATORS}
        for run, (scope, healed) in RUNS.items()
    }
    complete = {run: _complete(curves) for run, curves in pruning.items()}
    means = {
        run: {name: _mean_gap(curves[name], complete[run]) for name in ESTIMATORS}
        for run, curves in pruning.items()
    }
    return {
        "kind": kind,
        "unit": unit,
        "units": sum(map(len, next(iter(tables.values())))) if tables else None,
        "original": base,
        "agreement": {name: _agreement(tables, name) for name in ESTIMATORS},
        "noise": {name: _noise(mine, name) for name in ESTIMATORS},
        "cost": {name: _cost(mine, name) for name in ESTIMATORS},
        "pruning": pruning,
        "complete": complete,
        "mean_gap": means,
        "left": {name: _left(pruning, complete, name) for name in ESTIMATORS},
        "share_of_random": {
            run: {name: _over(value, of_run["random"]) for name, value in of_run.items()}
            for run, of_run in means.items()
        },
    }


def _agreement(tables: Mapping[tuple[str, int], Any], name: str) -> dict[str, Spread]:
    seeds = sorted(seed for one, seed in tables if one == name)
    pairs = [
        (tables[name, seed], tables[REFERENCE, seed])
        for seed in seeds
        if name != REFERENCE and (REFERENCE, seed) in tables
    ]
    return {
        "all": spread(compute_spearman(_flat(a), _flat(b)) for a, b in pairs),
        "within": spread(_within(a, b) for a, b in pairs),
        "top": spread(overlap(_flat(a), _flat(b), TOP) for a, b in pairs),
        "low": spread(overlap(_flat(a), _flat(b), TOP, lowest=True) for a, b in pairs),
        "again": spread(
            compute_spearman(_flat(tables[name, a]), _flat(tables[name, b]))
            for a, b in combinations(seeds, 2)
        ),
    }


def _within(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> float | None:
    layers = [
        found
        for one, other in zip(a, b, strict=True)
        if len(one) > 2 and (found := compute_spearman(one, other)) is not None
    ]
    return sum(layers) / len(layers) if layers else None


def _noise(mine: Mapping[Cell, Record], name: str) -> Spread:
    found = []
    for cell, record in mine.items():
        errors = [e for row in record.get("standard_errors", ()) for e in row if e is not None]
        if cell.what != SCORE or cell.estimator != name or not errors:
            continue
        scores = _flat(record["scores"])
        middle = sum(scores) / len(scores)
        deviation = (sum((s - middle) ** 2 for s in scores) / len(scores)) ** 0.5
        found.append(_over(median(errors), deviation))
    return spread(found)


def _cost(mine: Mapping[Cell, Record], name: str) -> Spread:
    return spread(
        record["seconds"]["score"] / record["forward_seconds"]
        for cell, record in mine.items()
        if cell.what == SCORE and cell.estimator == name
    )


def _curve(
    mine: Mapping[Cell, Record], name: str, scope: str, healed: bool, base: float | None
) -> list[dict[str, Any]]:
    points = []
    for amount in sorted({cell.amount for cell in mine if cell.scope == scope}):
        records = [
            record
            for cell, record in mine.items()
            if (cell.estimator, cell.scope, cell.amount, cell.healed)
            == (name, scope, amount, healed)
        ]
        if records and base is not None:
            points.append(
                {
                    "amount": amount,
                    "removed": median(record["removed"] / record["heads"] for record in records),
                    "seeds": sorted(record["seed"] for record in records),
                    "loss": spread(record["loss"] for record in records),
                    "gap": spread(record["loss"] - base for record in records),
                }
            )
    return points


def _complete(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[float]:
    """Amounts at which every estimator was measured, and heads went."""
    amounts = [
        {point["amount"] for point in curves[name] if point["removed"] > 0} for name in ESTIMATORS
    ]
    return sorted(set.intersection(*amounts))


def _mean_gap(curve: Sequence[Mapping[str, Any]], amounts: Sequence[float]) -> float | None:
    gaps = [point["gap"]["median"] for point in curve if point["amount"] in amounts]
    return sum(gaps) / len(gaps) if gaps else None


def _left(pruning: Any, complete: Mapping[str, Sequence[float]], name: str) -> float | None:
    both = [amount for amount in complete["global"] if amount in complete["healed"]]
    after, before = (_mean_gap(pruning[run][name], both) for run in ("healed", "global"))
    return _over(after, before)


def _scopes(cases: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """Of the shares at which both scopes take as many heads, where `global` loses less."""
    compared = better = 0
    amounts: set[float] = set()
    for case in cases:
        layers = {point["amount"]: point for point in case["pruning"]["layer"][name]}
        for point in case["pruning"]["global"][name]:
            other = layers.get(point["amount"])
            if other is None or point["removed"] != other["removed"] or not point["removed"]:
                continue
            amounts.add(point["amount"])
            compared += 1
            better += point["gap"]["median"] < other["gap"]["median"]
    return {"of": compared, "global_better": better, "amounts": sorted(amounts)}


def _overall(cases: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """Medians over cases, each with how many cases there were."""
    of_agreement = [case["agreement"][name] for case in cases]
    found: dict[str, Any] = {
        key: _over_cases(one[key] and one[key]["median"] for one in of_agreement)
        for key in ("all", "within", "top", "low", "again")
    }
    found["noise"] = _over_cases(c["noise"][name] and c["noise"][name]["median"] for c in cases)
    found["cost"] = _over_cases(c["cost"][name] and c["cost"][name]["median"] for c in cases)
    found["left"] = _over_cases(case["left"][name] for case in cases)
    for run in RUNS:
        found[run] = _over_cases(case["share_of_random"][run][name] for case in cases)
    return found


def _over_cases(values: Iterable[float | None]) -> dict[str, float] | None:
    there = [value for value in values if value is not None]
    return {"median": median(there), "cases": len(there)} if there else None


def _flat(rows: Sequence[Sequence[float]]) -> list[float]:
    return [score for row in rows for score in row]


def _over(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None or b <= 0 else a / b
