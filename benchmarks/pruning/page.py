"""The page of the pruning benchmark, from the JSON that was kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.pruning.runs import LESS, P, S
from surgery.units import format_bytes, format_count

PAGE = Path(__file__).parents[2] / "docs/benchmarks/pruning.md"
TARGET = 0.01  # of the original's loss


def page(figures: Mapping[str, Any]) -> str:
    """Markdown."""
    runs, clock = figures.get("runs", []), figures.get("clock", [])
    machine = figures["machine"]
    lines = [
        "# What pruning costs and saves",
        "",
        "<!-- Written by `python -m benchmarks.pruning --render`; do not edit. -->",
        "",
        f"The embedded model, {figures.get('steps', 0)} healing steps of 8 x 512 tokens each "
        f"({figures.get('share', 0.0):.0%} of those it was trained on), held-out loss in nats per "
        f"byte over 512 windows. `{figures['command']}`, kept in "
        "`benchmarks/results/pruning.json`.",
        *_group(runs, P, "## 40% of the heads"),
        *_verdict(runs),
        *_group(runs, LESS, "## Fewer heads, the same recipe"),
        *_group(runs, S, "## A student with half the heads"),
        *_ranking(runs),
        *_clock(clock),
        "",
        f"Machine: {machine['cpu']}, {machine['cpus']} CPUs, {machine['threads']} threads; torch "
        f"{figures['versions']['torch']}.",
    ]
    return "\n".join(lines) + "\n"


def _group(runs: Sequence[Mapping[str, Any]], group: str, title: str) -> list[str]:
    chosen = [run for run in runs if run["group"] == group]
    if not chosen:
        return []
    seeds = sorted({run["seed"] for run in chosen})
    lines = [
        "",
        title,
        "",
        "| | what | seed | original | after surgery | after training | of the original "
        "| parameters | KV bytes per token | attention FLOPs | export |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in sorted(chosen, key=lambda run: (run["after"]["loss"], seeds.index(run["seed"]))):
        after, before = run["after"], original(runs)
        opened = "" if run["opened"] is None else f"{run['opened']:.4f}"
        lines.append(
            f"| {run['name']} | {run['what']} | {run['seed']} | {before['loss']:.4f} | {opened} "
            f"| {after['loss']:.4f} | {after['loss'] / before['loss'] - 1:+.1%} "
            f"| {format_count(after['parameters'])} "
            f"({after['parameters'] / before['parameters'] - 1:+.0%}) "
            f"| {format_bytes(after['kv_bytes_per_token'])} "
            f"({after['kv_bytes_per_token'] / before['kv_bytes_per_token'] - 1:+.0%}) "
            f"| {format_count(after['attention_flops'])} "
            f"({after['attention_flops'] / before['attention_flops'] - 1:+.0%}) "
            f"| {run['format']} |"
        )
    return lines


def original(runs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The figures of the model that all start from (or, from scratch, are held against)."""
    found: Mapping[str, Any] = next(r["before"] for r in runs if r["group"] == P or r["opened"])
    return found


def _verdict(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    recipe = [run for run in runs if run["name"] == "recipe"]
    if not recipe:
        return []
    worst = max(run["after"]["loss"] / run["before"]["loss"] - 1 for run in recipe)
    same = all(
        run["after"][field] == run["planned"][field]
        for run in recipe
        for field in ("parameters", "attention_flops")
    )
    return [
        "",
        f"The recipe ends {worst:+.2%} from the original"
        f"{' at worst' if len(recipe) > 1 else ''}; asked for was {TARGET:.0%}, "
        f"{'met' if worst <= TARGET else 'missed'}. Parameters and attention FLOPs are "
        f"{'what the plan had said' if same else 'not what the plan had said'}.",
    ]


def _ranking(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    chosen = sorted((r for r in runs if r["group"] == S), key=lambda run: run["after"]["loss"])
    if len(chosen) < 2:
        return []
    first, last = chosen[0], chosen[-1]
    return [
        "",
        f"At equal tokens the best is {first['name']} with {first['after']['loss']:.4f}, the last "
        f"{last['name']} with {last['after']['loss']:.4f}.",
    ]


def _clock(clock: Sequence[Mapping[str, Any]]) -> list[str]:
    if not clock:
        return []
    lines = [
        "",
        "## On the clock",
        "",
        f"One forward pass over windows of {clock[0]['tokens']} tokens in fp32, original and "
        f"pruned in turn in one process, medians of {clock[0]['rounds']} rounds.",
        "",
        "| | batch | threads | attention blocks, ms | whole model, ms | attention blocks, times as "
        "fast | whole model, times as fast |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for timed in clock:
        before, after = timed["ms"]["original"], timed["ms"][timed["name"]]
        ratios = timed["speedup"]
        lines.append(
            f"| {timed['name']} | {timed['batch']} | {timed['threads']} "
            f"| {before['attention']:.1f} → {after['attention']:.1f} "
            f"| {before['whole']:.1f} → {after['whole']:.1f} "
            f"| {_spread(ratios['attention'])} | {_spread(ratios['whole'])} |"
        )
    return lines


def _spread(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
