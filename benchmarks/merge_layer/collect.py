"""The statistics of one layer, as calibration collects them, and what a window of them costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.merge_layer.layer import Preset, build, windows
from benchmarks.merge_layer.memory import kept_bytes, peak
from surgery.calibration.output_moments import OutputMoments
from surgery.calibration.view import observe_site
from surgery.models.copies import make_sharing_copy
from surgery.operations.gqa import solve
from surgery.operations.gqa.moments import SiteMoments
from surgery.operations.gqa.wide import set_wide


@torch.no_grad()
def collect(preset: Preset, path: Path) -> dict[str, Any]:
    """Write model, site, groups and statistics to `path`; seconds per window of each pass.

    Windows are timed at the rows per window that the preset means, and the statistics that are
    written are those of `measured_rows`.
    """
    model, site = build(preset)
    work = make_sharing_copy(model)
    output = site.output

    def statistics(groups: Any, rows: int) -> tuple[SiteMoments, Callable[[Any], None]]:
        moments = SiteMoments(work, site, groups, rows, seed=0, values=not groups)
        return moments, lambda batch: moments.add(observe_site(work, site, batch))

    first, add = statistics((), preset.rows)
    grouping = _pass(preset, add)
    groups = solve.group_similar_heads(work, site, first, preset.kv_heads)
    _, add = statistics(groups, preset.rows)
    attended = _pass(preset, add, count=2)
    most = peak()  # more rows at once, as below, is nothing that a calibration does
    second, add = statistics(groups, preset.measured_rows)
    _pass(preset, add)

    merge = solve.merge_optimal(work, site, second, groups)
    set_wide(work, site, merge)
    refit = OutputMoments(output.in_features, output.out_features, torch.device("cpu"))

    def equations(batch: Any) -> None:
        target = observe_site(model, site, batch, attention=False).output
        seen = observe_site(work, site, batch, attention=False)
        assert target is not None
        assert seen.inputs is not None
        refit.add(seen.inputs.flatten(0, -2), target.flatten(0, -2))

    outputs = _pass(preset, equations)
    first.model = second.model = model  # the same weights at the time
    torch.save((model, site, groups, first, second, refit), path)
    passes = {"similarity": grouping, "attended values": attended, "refit": outputs}
    medians = {name: sorted(seconds)[len(seconds) // 2] for name, seconds in passes.items()}
    return {
        "seconds_per_window": medians,
        "windows_timed": {name: len(seconds) for name, seconds in passes.items()},
        "minutes_extrapolated": sum(medians.values()) * preset.windows / 60,
        "peak_bytes": most,
        "kept_bytes": kept_bytes(first) + kept_bytes(second),
        "kept_bytes_refit": kept_bytes(refit),
    }


def _pass(preset: Preset, add: Callable[[Any], None], count: int | None = None) -> list[float]:
    """Seconds of each window; what makes the inputs does not count."""
    found = []
    for batch in _inputs(preset, count):
        started = time.perf_counter()
        add(batch)
        found.append(time.perf_counter() - started)
    return found


def _inputs(preset: Preset, count: int | None) -> Iterator[dict[str, torch.Tensor]]:
    return windows(preset, min(count or preset.measured, preset.measured))
