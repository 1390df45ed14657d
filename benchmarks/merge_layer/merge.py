"""The merge itself, phase by phase, from statistics in a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.merge_layer.memory import peak, resident
from surgery.calibration.grouping import make_contiguous_groups
from surgery.calibration.rows import get_weight_rows
from surgery.operations.gqa import solve
from surgery.transforms.heads import combine_heads

# Of the refit's solve, whose time does not depend on it.
RIDGE = 1e-3


@torch.no_grad()
def optimal(path: Path, kv_heads: int) -> dict[str, Any]:
    """Grouping by similarity, shared keys and values in closed form, and the refit's solve."""
    model, site, groups, first, second, refit = torch.load(path, weights_only=False)
    weight = model.get_parameter(f"{site.output.path}.weight")
    before = resident()
    phases: dict[str, float] = {}
    peaks = {}
    with _timed(phases, "grouping"):
        found = solve.group_similar_heads(model, site, first, kv_heads)
    peaks["grouping"] = peak()
    # The attended values in the file are those of the groups that the same statistics gave.
    assert found == groups
    with _timed(phases, "assembly"), _inside(phases, "share_keys", "share_values"):
        merge = solve.merge_optimal(model, site, second, groups)
    phases["keys"], phases["values"] = phases.pop("share_keys"), phases.pop("share_values")
    phases["assembly"] -= phases["keys"] + phases["values"]
    peaks["keys and values"] = peak()
    with _timed(phases, "refit solve"):
        made, _ = refit.solve(weight.double(), None, RIDGE)
    return {
        "phases_s": {
            name: phases[name] for name in ("grouping", "keys", "values", "assembly", "refit solve")
        },
        "seconds": sum(phases.values()),
        "peak_bytes": peak(),
        "peak_bytes_after": {**peaks, "refit solve": peak()},
        "resident_before_bytes": before,
        "losses": merge.losses,
        "finite": bool(made.isfinite().all()),
    }


@torch.no_grad()
def mean_pool(path: Path, kv_heads: int) -> dict[str, Any]:
    """The same layer's keys and values averaged over neighbours: no statistics, no solve."""
    model, site, *_ = torch.load(path, weights_only=False, mmap=True)
    for role in ("key", "value"):
        get_weight_rows(model, site, role)  # from the disk
    before = resident()
    phases: dict[str, float] = {}
    parts = make_contiguous_groups(site.kv_heads, kv_heads)
    with _timed(phases, "mean"):
        for projection in (site.key, site.value):
            weight = model.get_parameter(f"{projection.path}.weight")
            combine_heads([weight], axis=0, unit=projection.unit, parts=parts)
    return {"seconds": phases["mean"], "peak_bytes": peak(), "resident_before_bytes": before}


@contextmanager
def _timed(phases: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    phases[name] = phases.get(name, 0.0) + time.perf_counter() - started


@contextmanager
def _inside(phases: dict[str, float], *names: str) -> Iterator[None]:
    """Times what `solve` calls by these names."""
    plain = {name: getattr(solve, name) for name in names}

    def clocked(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with _timed(phases, name):
                return plain[name](*args, **kwargs)

        return call

    for name in names:
        setattr(solve, name, clocked(name))
    try:
        yield
    finally:
        for name, function in plain.items():
            setattr(solve, name, function)
