"""The page of the merge's cost, from the JSON that was kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs/benchmarks/merge_layer.md"


def page(figures: Mapping[str, Any]) -> str:
    """Markdown."""
    p, merge, collecting = figures["preset"], figures["merge"], figures["collecting"]
    mean, naive = figures["alternatives"].values()
    machine, limits = figures["machine"], figures["limits"]
    lines = [
        "# What merging one layer costs",
        "",
        "<!-- Written by `python -m benchmarks.merge_layer --render`; do not edit. -->",
        "",
        f"One attention layer of the shape of {p['name']} ({p['heads']} heads x {p['head_dim']}, "
        f"hidden {p['hidden']}), {p['heads']} KV heads → {p['kv_heads']}, `grouping=similarity`, "
        f"`merge=optimal` and the refit's solve, given the statistics of {p['windows']} x "
        f"{p['length']} positions. `{figures['command']}`, kept in "
        "`benchmarks/results/merge_layer.json`.",
        "",
        "| | measured | wanted |",
        "| --- | --- | --- |",
        f"| time | {merge['seconds']:.1f} s ({min(merge['rounds_s']):.1f} to "
        f"{max(merge['rounds_s']):.1f}) | at most {limits['seconds']:.0f} s |",
        f"| peak memory of the process | {_gb(merge['peak_bytes'])} "
        f"| at most {_gb(limits['peak_bytes'])} |",
        f"| before the merge began | {_gb(merge['resident_before_bytes'])} | |",
        "",
        "| phase | seconds |",
        "| --- | --- |",
        *(f"| {name} | {seconds:.2f} |" for name, seconds in merge["phases_s"].items()),
        "",
        f"- Machine: {machine['cpu']}, {machine['cpus']} CPUs, {machine['threads']} threads; torch "
        f"{figures['versions']['torch']}. Every merge in a fresh process that loads the layer and "
        f"its statistics from a file; the median of {len(merge['rounds_s'])}, and the largest "
        "peak (VmHWM).",
        f"- Statistics kept: {_gb(collecting['kept_bytes'])} for keys and values, "
        f"{_gb(collecting['kept_bytes_refit'])} for the refit, whatever the number of tokens. One "
        f"hidden x hidden covariance per head would be {_gb(naive['kept_bytes'])}, "
        f"{naive['kept_ratio']:.0f} times as much.",
        f"- Averaging the same keys and values takes {mean['seconds']:.2g} s and a process of "
        f"{_gb(mean['peak_bytes'])}: the closed form takes {mean['seconds_ratio']:.0f} times the "
        f"time and {mean['peak_ratio']:.1f} times the memory.",
        "- Collecting, in seconds per window: "
        + ", ".join(f"{name} {s:.1f}" for name, s in collecting["seconds_per_window"].items())
        + f"; for {p['windows']} windows {collecting['minutes_extrapolated']:.0f} minutes "
        f"(extrapolated), {_gb(collecting['peak_bytes'])} at most.",
        f"- Data: {figures['data']}",
    ]
    return "\n".join(lines) + "\n"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e3:.0f} kB"
