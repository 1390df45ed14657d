"""The picture and the page of the ladder, from the JSON that was kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.ladder.models import BASELINE, FUSED, GQA
from surgery.console import say

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/benchmarks/ladder.md"
PICTURE = ROOT / "docs/images/ladder.png"

_COLOURS = ("#b8c0cc", "#4c6a92", "#588157", "#c8553d")
_LABELS = (
    "baseline: eager, MHA",
    "+ fast attention",
    "+ GQA, 32 → 8 KV heads",
    "+ fused projections",
)
_TITLES = {
    "forward": "forward pass",
    "train": "training step (forward + backward)",
    "decode": "cached decoding, per token",
}
_WAYS = {"fused_phi3": "`rehouse` into Phi-3", "fused_live": "`fuse_qkv` on the live Llama"}


def render(folder: Path, page: Path = PAGE, picture: Path = PICTURE) -> None:
    """Draw every `ladder-*.json` of a folder."""
    found = sorted(folder.glob("ladder-*.json"), key=lambda path: (len(path.stem), path.stem))
    if not found:
        raise SystemExit(f"no ladder-*.json in {folder}: measure first")
    runs = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in found}
    for path in (page, picture):
        path.parent.mkdir(parents=True, exist_ok=True)
    draw(list(runs.values()), picture)
    page.write_text(_page(runs), encoding="utf-8")
    say(f"drawn: {picture}, {page}")


def draw(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A row of panels per run, a panel per workload, a group of bars per length."""
    wide = max(len(run["results"]) for run in runs)
    figure = Figure(figsize=(4.4 * wide, 3.5 * len(runs) + 0.4), dpi=150)
    figure.set_layout_engine("constrained")
    grid = figure.subplots(len(runs), wide, squeeze=False)
    for row, run in zip(grid, runs, strict=True):
        for axes in row[len(run["results"]) :]:
            axes.set_visible(False)
        for axes, (workload, cells) in zip(row, run["results"].items(), strict=False):
            _panel(axes, run, cells, ladder=workload == "forward")
            axes.set_title(_TITLES[workload], fontsize=10)
        row[0].set_ylabel(f"speed-up\n{_machine(run)}", fontsize=8)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=5 if wide > 2 else 2,
        frameon=False,
        fontsize=8,
    )
    figure.savefig(path)


def _panel(axes: Any, run: Mapping[str, Any], cells: Mapping[str, Any], *, ladder: bool) -> None:
    rungs = _rungs(run)
    width = 0.8 / len(rungs)
    for number, rung in enumerate(rungs):
        places = [i + (number - 1.5) * width for i in range(len(cells))]
        speedups = [cell[rung].get("speedup") for cell in cells.values()]
        shown = [
            (place, s["median"], s["median"] - s["min"], s["max"] - s["median"])
            for place, s in zip(places, speedups, strict=True)
            if s
        ]
        if not shown:
            continue
        at, heights, below, above = zip(*shown, strict=True)
        bars = axes.bar(
            at,
            heights,
            width * 0.92,
            color=_COLOURS[number],
            label=_LABELS[number],
            yerr=(below, above),
            error_kw={"linewidth": 0.7, "ecolor": "#333333"},
        )
        if number:
            texts = [f"{height:.1f}" for height in heights]
            axes.bar_label(bars, texts, fontsize=6, padding=1)
    if ladder:
        for number, (name, level) in enumerate(run["published"].items()):
            if name != BASELINE:
                label = "published (forward pass)" if name == "fused" else None
                colour = _COLOURS[number]
                axes.axhline(level, color=colour, linestyle=":", linewidth=1.1, label=label)
    axes.set_xticks(range(len(cells)), list(cells))
    axes.set_xlabel("tokens", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)


def _page(runs: Mapping[str, Mapping[str, Any]]) -> str:
    return "\n".join([_HEAD, *(_section(name, run) for name, run in runs.items())])


_HEAD = """\
# The ladder

<!-- Written by `python -m benchmarks.ladder --render`; do not edit. -->

Fast attention, then fewer KV heads, then fused projections: each rung is planned and applied by
this project's operations (`make_plan`, `apply_`) to the same random Llama, and timed against the
model it came from.

    python -m benchmarks.ladder                    # on the CPU
    python -m benchmarks.ladder --malloc keep      # the same, without the cost of fresh pages
    python -m benchmarks.ladder --preset gpu
    python -m benchmarks.ladder --render           # this page and the picture, from the JSON

![Speed-up of each rung](../images/ladder.png)

The ladder as published, for a forward pass with 32 heads: 1x, 2.5x, 3.3x, 4x.

How it is measured: all rungs live in one process and are timed in turn, round after round, after a
warm-up that does not count; a speed-up is the median over rounds of baseline / rung in the same
round, with the lowest and the highest in brackets. Forward: logits of the last position, no
gradient, no cache. Training: loss over all positions and its gradients, no optimizer. Decoding:
greedy, transformers' `DynamicCache`, after a prompt that is not timed.
`fused` is one of two ways to fuse, the one that was quicker over all cells of the run.
"""


def _section(name: str, run: Mapping[str, Any]) -> str:
    p, machine = run["preset"], run["machine"]
    lines = [
        f"## {_machine(run)}",
        "",
        f"`{run['command']}`, kept in `benchmarks/results/{name}`; {run['minutes']:.0f} minutes.",
        "",
        f"- Model: Llama, {p['layers']} layers, hidden {p['hidden_size']}, {p['heads']} heads x "
        f"{p['head_dim']}, MLP {p['intermediate_size']}, vocabulary {p['vocabulary']}, "
        f"{run['parameters'] / 1e6:.1f} M parameters, {p['dtype']}, batch {p['batch']}; KV heads "
        f"{p['heads']} → {p['kv_heads']}.",
        f"- Machine: {machine['cpu']}, {machine['cpus']} CPUs, {machine['threads']} threads, "
        f"GPU: {machine['gpu'] or 'none'}; torch {run['versions']['torch']}, transformers "
        f"{run['versions']['transformers']}; attention on the fast rungs: "
        f"`{run['backends']['fast']}`.",
        f"- Fused by {_WAYS[run['fused']]}.",
        "- Logits differ (root mean square / standard deviation): "
        + ", ".join(f"{pair.replace('_', ' ')} {e:.1e}" for pair, e in run["logits_differ"].items())
        + ".",
        *_pages_line(run),
        "",
    ]
    for workload, cells in run["results"].items():
        unit = run["units"][workload]
        lines += [f"### {_TITLES[workload].capitalize()}", "", *_table(run, cells, unit), ""]
    return "\n".join(lines)


def _pages_line(run: Mapping[str, Any]) -> list[str]:
    pages = run["fresh_pages_bytes_per_s"]
    if pages is None:
        return []
    first, again = pages["first_touch"] / 1e9, pages["again"] / 1e9
    kept = run["malloc"] == "keep"
    meaning = (
        "freed memory is reused here (`--malloc keep`), so that this plays no part"
        if kept
        else "malloc hands large tensors back at once, and eager attention, whose score matrices "
        "are the largest, pays for fresh pages each time; `--malloc keep` measures without"
    )
    return [
        f"- Memory: {first:.1f} GB/s where it is touched for the first time, {again:.1f} GB/s "
        f"after that: {meaning}."
    ]


def _table(run: Mapping[str, Any], cells: Mapping[str, Any], unit: str) -> list[str]:
    bound = any("bound_ms" in cell[BASELINE] for cell in cells.values())
    head = f"| tokens | baseline, {unit} | + fast attention | + GQA | + fused | "
    head += "the other way to fuse | rounds |"
    head += " of the bandwidth bound: baseline, + GQA |" if bound else ""
    lines = [head, "| --- " * (8 if bound else 7) + "|"]
    _, *above = _rungs(run)
    (other,) = (way for way in FUSED if way != run["fused"])
    for length, cell in cells.items():
        base = cell[BASELINE]
        values = [length, f"{base['median']:.4g}" if "median" in base else base["failed"]]
        values += [_speedup(cell[rung]) for rung in (*above, other)]
        values.append(str(max(len(rung.get("rounds", ())) for rung in cell.values())))
        if bound:
            values.append(", ".join(_share(cell[rung]) for rung in (BASELINE, GQA)))
        lines.append("| " + " | ".join(values) + " |")
    return lines


def _speedup(rung: Mapping[str, Any]) -> str:
    if "speedup" not in rung:
        return f"{rung['median']:.4g} ms" if "median" in rung else str(rung["failed"])
    s = rung["speedup"]
    return f"{s['median']:.2f}x ({s['min']:.2f} to {s['max']:.2f})"


def _share(rung: Mapping[str, Any]) -> str:
    return f"{rung['share_of_bound']:.0%}" if "share_of_bound" in rung else "none"


def _rungs(run: Mapping[str, Any]) -> tuple[str, ...]:
    return (BASELINE, "fast", GQA, run["fused"])


def _machine(run: Mapping[str, Any]) -> str:
    machine = run["machine"]
    if run["preset"]["device"] == "cuda":
        return str(machine["gpu"])
    memory = "freed memory reused" if run["malloc"] == "keep" else "malloc as it is"
    return f"{machine['cpu']}, {machine['threads']} threads, {memory}"
