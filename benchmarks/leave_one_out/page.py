"""The page on leave-one-out's speed, from the JSON that was kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs/benchmarks/leave_one_out.md"


def page(figures: Mapping[str, Any]) -> str:
    """Markdown."""
    machine, wanted, subjects = figures["machine"], figures["wanted"], figures["subjects"]
    first = subjects[0]
    reached = "is reached" if first["speedup"] >= wanted else "is not reached"
    lines = [
        "# Leave-one-out, and a whole pass per head",
        "",
        "<!-- Written by `python -m benchmarks.leave_one_out --render`; do not edit. -->",
        "",
        "`leave_one_out` takes every head away in turn and looks at the loss. The plain loop runs "
        "the whole model for each; the shared way runs each row once, resumes every layer behind "
        "its attention, takes the head's share out of the output projection's result, and runs "
        f"the layers above. `{figures['command']}`, kept in "
        "`benchmarks/results/leave_one_out.json`.",
        "",
        "| model, rows x bytes | heads | plain | shared | times as fast | by CPU time "
        "| matrix products saved | scores differ by at most |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(_line(one) for one in subjects),
        "",
        f"On the embedded model in batches of {first['rows']} x {first['length']}, "
        f"{wanted:g} times as fast was wanted, and {reached}: {first['speedup']:.2f}.",
        "",
        "| model, rows x bytes | memory of plain | of shared |",
        "| --- | --- | --- |",
        *(_memory(one) for one in subjects),
        "",
        f"- Machine: {machine['cpu']}, {machine['cpus']} CPUs, {machine['threads']} threads; torch "
        f"{figures['versions']['torch']}. Both ways in one process, in turn; medians of "
        f"{first['rounds']} rounds, and the ratio is the median of each round's. CPU time leaves "
        "out what other programs took meanwhile.",
        "- Both ways in inference mode, without a key-value cache, in fp32, over the same batch, "
        "and both include the pass of the model as it is.",
        "- Memory: the most that a fresh process took beyond the model and the batch (VmHWM); of "
        "the plain loop, over one layer.",
        "- The bound: a head of layer l of L still needs the MLP of its layer and all of the "
        "L - l layers above, so no more than about half of the work can be shared, whatever the "
        "depth. The counted matrix products (attention's own are not among them) say the same. "
        "What is gained beyond that comes from passes whose intermediate results stay in the "
        "CPU's caches, and, for short rows, from heads side by side.",
    ]
    return "\n".join(lines) + "\n"


def _line(one: Mapping[str, Any]) -> str:
    seconds = one["seconds"]
    return (
        f"| {one['name']} | {one['heads']} in {one['layers']} layers | {seconds['plain']:.2f} s "
        f"| {seconds['shared']:.2f} s | {one['speedup']:.2f} | {one['speedup_cpu']:.2f} "
        f"| {one['products_ratio']:.2f} times fewer | {one['largest_difference']:.1g} nats |"
    )


def _memory(one: Mapping[str, Any]) -> str:
    taken = [
        one["memory"][way]["peak_bytes"] - one["memory"][way]["before_bytes"]
        for way in ("plain", "shared")
    ]
    return f"| {one['name']} | " + " | ".join(f"{size / 1e6:.0f} MB" for size in taken) + " |"
