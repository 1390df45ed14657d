"""What is claimed, against what came out: medians over seeds, ``None`` if there is none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.real.rows import (
    AMOUNTS,
    ELIMINATION,
    ESTIMATORS,
    HEALED_PRUNINGS,
    ORIGINAL,
    name_cut,
)
from benchmarks.real.sizes import Sizes

Rows = Mapping[str, Mapping[str, Any]]
Value = Callable[[Rows], float | None]

NO_WORSE = 0.0
# How much of the original's loss pruning may add, as cut with refit.
PRUNED = {10: 0.012, 20: 0.035, 40: 0.12}


def get_median(rows: Rows, name: str, figure: str) -> float | None:
    """The median over the seeds of a row that are done."""
    values = [
        record["figures"].get(figure)
        for record in rows.get(name, {}).get("records", ())
        if record["status"] == "done"
    ]
    numbers = [value for value in values if isinstance(value, (int, float))]
    return median(numbers) if numbers else None


def compute_gap(rows: Rows, name: str) -> float | None:
    """Loss above the original's, nats per token."""
    loss, original = get_median(rows, name, "loss"), get_median(rows, ORIGINAL, "loss")
    return None if loss is None or original is None else loss - original


def compute_rise(rows: Rows, name: str) -> float | None:
    """The same as a share of the original's loss."""
    gap, original = compute_gap(rows, name), get_median(rows, ORIGINAL, "loss")
    return None if gap is None or not original else gap / original


def compute_share(rows: Rows, name: str, of: str) -> float | None:
    gap, whole = compute_gap(rows, name), compute_gap(rows, of)
    return None if gap is None or whole is None or whole <= 0 else gap / whole


def find_best_cut(rows: Rows, amount: int) -> str:
    """The row of the estimator that loses least with refit; the first if none was run."""
    return _find_least(rows, [name_cut(one, amount, True) for one in (ELIMINATION, *ESTIMATORS)])


def _find_least(rows: Rows, names: Sequence[str]) -> str:
    known = {name: rise for name in names if (rise := compute_rise(rows, name)) is not None}
    return min(known, key=known.__getitem__, default=names[0])


def compute_worst_healing(rows: Rows) -> float | None:
    """The largest loss after healing, less the one before it, over all rows and seeds."""
    found = [
        record["figures"]["loss"] - record["figures"]["loss_before"]
        for row in rows.values()
        for record in row["records"]
        if record["status"] == "done" and "loss_before" in record["figures"]
    ]
    return max(found, default=None)


def get_calibration_seconds(rows: Rows, name: str) -> float | None:
    values = [
        cost["seconds"]
        for record in rows.get(name, {}).get("records", ())
        if record["status"] == "done"
        for cost in record["costs"]
        if cost["stage"] == "calibrate"
    ]
    return median(values) if values else None


def list_targets(rows: Rows, sizes: Sizes) -> list[dict[str, Any]]:
    """Each with its bound, what came out, and the row that it is about."""
    few, many = (f"gqa-optimal-{w}x{t}" for w, t in (sizes.few, sizes.many))
    average = "gqa-average-2"
    found: list[dict[str, Any]] = []

    def add(name: str, what: str, row: str, value: float | None, at_most: float, unit: str) -> None:
        reached = None if value is None else value <= at_most
        found.append(
            {
                "name": name,
                "what": what,
                "row": row,
                "value": value,
                "at_most": at_most,
                "unit": unit,
                "reached": reached,
            }
        )

    for key, row, bound in (("many", many, 0.06), ("few", few, 0.15)):
        windows, tokens = getattr(sizes, key)
        add(
            f"merge-{key}",
            f"to one KV head as cut, {windows} windows x {tokens}: gap / mean pooling's gap",
            row,
            compute_share(rows, row, "gqa-mean"),
            bound,
            "ratio",
        )
    add(
        "merge-average",
        "two KV heads on average, as cut: gap / the gap of one KV head",
        average,
        compute_share(rows, average, many),
        0.25,
        "ratio",
    )
    for name, row, bound in (("one", many, 0.10), ("average", average, 0.03)):
        what = "to one KV head" if name == "one" else "two KV heads on average"
        add(
            f"heal-{name}",
            f"{what}, healed on {sizes.healed:,} tokens at most: loss above the original's",
            f"heal-{row}",
            compute_rise(rows, f"heal-{row}"),
            bound,
            "share",
        )
    for amount in AMOUNTS:
        row = find_best_cut(rows, amount)
        add(
            f"prune-{amount}",
            f"{amount}% of the heads removed as cut, with refit: loss above the original's",
            row,
            compute_rise(rows, row),
            PRUNED[amount],
            "share",
        )
    healed = _find_least(rows, [f"heal-{start}" for start in HEALED_PRUNINGS])
    add(
        "heal-prune",
        f"20% removed, healed on {sizes.healed_pruned:,} tokens at most: loss above the original's",
        healed,
        compute_rise(rows, healed),
        0.01,
        "share",
    )
    add(
        "no-worse",
        "every healing, at any rate here: loss after, less loss before, at worst",
        "",
        compute_worst_healing(rows),
        NO_WORSE,
        "nats",
    )
    windows, tokens = sizes.many
    add(
        "calibration-time",
        f"calibrating {windows} windows x {tokens} tokens",
        many,
        get_calibration_seconds(rows, many),
        720.0,
        "seconds",
    )
    return found


def find_roles_order(rows: Rows) -> Mapping[str, Any] | None:
    """The roles of the row `roles`."""
    records: Sequence[Mapping[str, Any]] = rows.get("roles", {}).get("records", ())
    for record in records:
        if record["status"] == "done":
            roles: Mapping[str, Any] = record["figures"]["roles"]
            return roles
    return None
