"""The page's tables of targets: what was wanted, what came out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.merge_quality.figures import times_smaller
from benchmarks.shared.markdown import NOTHING, table


def targets_table(targets: Sequence[Mapping[str, Any]]) -> str:
    reached = sum(target["reached"] is True for target in targets)
    known = sum(target["reached"] is not None for target in targets)
    text = (
        f"For `optimal` at {targets[0]['ratio']}, medians over models: {reached} of {known} "
        f"reached, {len(targets) - known} without a figure."
    )
    kinds = sorted({kind for target in targets for kind in target["kinds"]})
    rows = []
    for target in targets:
        row = [target["what"], _wanted(target), f"**{_as_asked(target, target['median'])}**"]
        row += [_as_asked(target, target["kinds"].get(kind)) for kind in kinds]
        rows.append([*row, {True: "yes", False: "no", None: "no figure"}[target["reached"]]])
    return "\n".join([text, "", *table(["", "wanted", "median", *kinds, "reached"], rows), ""])


def _wanted(target: Mapping[str, Any]) -> str:
    if target["at_least"] is not None:
        return f"at least {target['at_least']:.0%}"
    return f"at most 1/{1 / target['at_most']:.0f}"


def _as_asked(target: Mapping[str, Any], value: float | None) -> str:
    if value is None:
        return NOTHING
    if target["at_least"] is not None:
        return f"{value:.1%}"
    times = times_smaller(value)
    return f"{value:.3f}" + (f" ({times:.1f}x smaller)" if times is not None else " (none left)")
