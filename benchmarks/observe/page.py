"""The page on what watching costs, from the JSON that was kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.observe.targets import RESOLUTION, TIME_RESOLUTION, extra_bytes
from benchmarks.observe.variants import ALL, EAGER, EXPLICIT, PICTURED, WATCHED
from benchmarks.shared.markdown import NOTHING, table
from surgery.units import format_bytes

PAGE = Path(__file__).parents[2] / "docs/benchmarks/observe.md"
SHOWN = (WATCHED, PICTURED, ALL, EAGER, EXPLICIT)
LENS = "TransformerLens"


def page(figures: Mapping[str, Any]) -> str:
    """Markdown."""
    preset, rows = figures["preset"], figures["rows"]
    machine, versions = figures["machine"], figures["versions"]
    cells = figures["lengths"]
    names = {
        WATCHED: f"every step, {rows} rows",
        PICTURED: "the same, pictures drawn",
        ALL: "every step, all rows",
        EAGER: "eager, not watched",
        EXPLICIT: "explicit map",
    }
    head = ["tokens", "plain step", "default cadence", *(names[one] for one in SHOWN), LENS]
    times = [_times(length, cell) for length, cell in cells.items()]
    memory_head = ["tokens", *(names[one] for one in SHOWN if one != PICTURED), LENS]
    lines = [
        "# Watching, and what it costs",
        "",
        "<!-- Written by `python -m benchmarks.observe --render`; do not edit. -->",
        "",
        "A training step (forward, backward, AdamW) of a Llama whose heads are watched by "
        "`AttentionStatistics`, against the same step unwatched, and against the way of tools "
        "that need the whole map: eager attention, `output_attentions=True`, the statistics taken "
        f"from the map. `{figures['command']}`, kept in `benchmarks/results/observe.json`.",
        "",
        "![Extra time and memory of a training step](../images/observe.png)",
        "",
        *table(["what", "wanted", "found", ""], [_target(one) for one in figures["targets"]]),
        "",
        "## Time",
        "",
        "Of a step, as a ratio to the plain one: the median over rounds, the lowest and the "
        "highest in brackets.",
        "",
        *table(head, times),
        "",
        "The same by CPU time, which leaves out what other programs took meanwhile:",
        "",
        *table(
            ["tokens", *(names[one] for one in SHOWN), LENS],
            [_cpu(length, cell) for length, cell in cells.items()],
        ),
        "",
        "## Memory",
        "",
        "At the peak of a step, beyond the plain step's.",
        "",
        *table(memory_head, [_memory(length, cell) for length, cell in cells.items()]),
        "",
        "## How it is measured",
        "",
        f"- Model: Llama, {preset['layers']} layers, hidden {preset['hidden']}, {preset['heads']} "
        f"heads x {preset['head_dim']}, {preset['kv_heads']} KV heads, random weights, fp32, "
        "batch 1, `sdpa` where not said otherwise.",
        f"- Machine: {machine['cpu']}, {machine['cpus']} CPUs, {machine['threads']} thread(s); "
        f"torch {versions['torch']}, transformers {versions['transformers']}.",
        "- All variants take their steps in one Lightning fit, in turn, W&B's logger (offline) on; "
        "each round begins with another one, and the first does not count. Rounds: "
        + ", ".join(f"{len(cell['time'][WATCHED]['all'])} of {n}" for n, cell in cells.items())
        + ".",
        "- Default cadence: one step in 25 observed, one in 100 drawn; the overhead per step "
        "follows from both. " + _direct(cells),
        "- Explicit map: ten of the statistics, in fp32, head by head, so that they take little "
        "memory beside the map; largest logits and output norms are not to be had from it.",
        f"- Memory: the most that a fresh process takes in three steps (VmHWM), less that of a "
        f"process of plain steps; medians of {preset['memory_rounds']} processes each. The C "
        "library gives every large tensor back at once here (MALLOC_MMAP_THRESHOLD_=65536): what "
        "it would keep for later differs from process to process by tens of MiB. TransformerLens's "
        "processes ran once each, without that. Differences below "
        f"{format_bytes(RESOLUTION)} say nothing.",
        f"- Less than {TIME_RESOLUTION:.0%} of a step counts as {TIME_RESOLUTION:.0%} where extra "
        "times are divided.",
        f"- {_lens(figures['lens'])}",
    ]
    return "\n".join(lines) + "\n"


def _target(one: Mapping[str, Any]) -> list[str]:
    value = one["value"]
    if value is None:
        return [one["what"], one["wanted"], NOTHING, "not measured"]
    shown = f"{value:.1%}" if "%" in one["wanted"] else f"{value:.1f}"
    return [one["what"], one["wanted"], shown, "reached" if one["reached"] else "**not reached**"]


def _times(length: str, cell: Mapping[str, Any]) -> list[str]:
    found = cell["time"]
    lens = NOTHING if cell["lens"] is None else _ratio(cell["lens"]["time"][LENS])
    return [
        length,
        f"{found['plain']['seconds']:.3g} s",
        f"{cell['default']['derived']:+.2%}",
        *(_ratio(found[one]) for one in SHOWN),
        lens,
    ]


def _cpu(length: str, cell: Mapping[str, Any]) -> list[str]:
    own = [f"{cell['time'][one]['cpu_ratio']:.2f}" for one in SHOWN]
    lens = cell["lens"]
    return [length, *own, NOTHING if lens is None else f"{lens['time'][LENS]['cpu_ratio']:.2f}"]


def _ratio(one: Mapping[str, Any]) -> str:
    low, high = one["ratio_range"]
    return f"{one['ratio']:.2f} ({low:.2f} to {high:.2f})"


def _memory(length: str, cell: Mapping[str, Any]) -> list[str]:
    own = [extra_bytes(cell["memory"], one) for one in SHOWN if one != PICTURED]
    lens = NOTHING if cell["lens"] is None else _size(extra_bytes(cell["lens"]["memory"], LENS))
    return [length, *map(_size, own), lens]


def _size(value: int) -> str:
    return format_bytes(value) if value >= RESOLUTION else f"below {format_bytes(RESOLUTION)}"


def _direct(cells: Mapping[str, Any]) -> str:
    found = [
        f"{cell['default']['direct']['overhead']:+.1%} at {length}"
        for length, cell in cells.items()
        if "direct" in cell["default"]
    ]
    return f"Measured directly, in blocks of 25 steps: {', '.join(found)}." if found else ""


def _lens(lens: Mapping[str, Any]) -> str:
    if lens["version"] is None:
        return f"TransformerLens was not measured: {lens['absent']}."
    return (
        f"TransformerLens {lens['version']}, in processes of its own beside their own plain step: "
        "`run_with_cache` of every attention pattern and of nothing else, the same statistics "
        "taken from it. It forces eager attention."
    )
