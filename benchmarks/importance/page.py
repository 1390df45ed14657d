"""The page: the question, how it was asked, and what the cells answer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.importance import sentences
from benchmarks.importance.grid import ESTIMATORS, REFERENCE, cells
from benchmarks.importance.names import RUN_NAMES, case_name, loss_name
from benchmarks.importance.presets import BERT
from benchmarks.shared.markdown import NOTHING, runs_said, table


def page(figures: Mapping[str, Any], page_at: Path, picture: Path, scopes: Path) -> str:
    """Markdown of the derived `figures`."""
    preset, said = figures["preset"], sentences
    shown = [os.path.relpath(path, page_at.parent) for path in (picture, scopes)]
    parts = [
        _HEAD,
        "## In short\n",
        said.joined(
            [
                *said.agreement(figures),
                *said.cost(figures),
                *said.losses(figures, "global", "As cut"),
                *said.losses(figures, "healed", "Healed"),
                *said.healing(figures),
                *said.foresight(figures),
            ]
        ),
        "\n## How it was asked\n",
        _setup(preset, figures),
        "## What agrees with what\n",
        _AGREEMENT.format(reference=REFERENCE),
        *table(_AGREEMENT_HEAD, _agreement(figures)),
        "\n## What pruning costs\n",
        f"![Loss above the original's against the share of heads that went]({shown[0]})\n",
        _PICTURE,
        *(part for case in figures["cases"] for part in _losses(case)),
        "## Heads of all layers, or of each\n",
        f"![The lowest of all layers against as many of every layer]({shown[1]})\n",
        said.joined(said.scopes(figures)),
        "\n## What this does not say\n",
        _limits(preset, figures),
        "## Runs\n",
        runs_said(figures["runs"], "importance.json"),
    ]
    return "\n".join(parts)


_HEAD = """\
# Which estimator knows which heads matter

<!-- Written by `python -m benchmarks.importance --render`; do not edit. -->

Before heads are cut, something has to say which. `leave_one_out` asks the loss itself, one head at
a time; `gate_gradient` and `output_norm` are cheaper and ask something else; `random` is the
control. Do they agree, and, what counts, whose choice loses least when many heads go at once,
before and after healing?

    python -m benchmarks.importance                # what is missing, best first; may be cut off
    python -m benchmarks.importance --no-healing   # only what needs no training
    python -m benchmarks.importance --quick        # tiny models and few cells
    python -m benchmarks.importance --render       # this page and the pictures, from the cells
"""

_AGREEMENT = """\
Agreement with `{reference}` on the same windows: **ranks**, Spearman's rank correlation over all
heads; **within**, the same within each layer of three heads and more, a mean; **top** and **low**,
of the quarter that one holds highest (lowest), the share that the other does, too (chance: a
quarter). **again**: the estimator's rank correlation with itself on another seed's windows.
**noise**: standard error of a score over batches as a share of the deviation of scores over heads.
**cost**: time, as a multiple of one forward pass over the same windows in the same process (without
the embeddings that 1 - cosine is taken to). Medians over seeds, with the lowest and highest in
brackets where they differ.
"""
_AGREEMENT_HEAD = ("case", "estimator", "ranks", "within", "top", "low", "again", "noise", "cost")

_PICTURE = """\
Medians over seeds with their range; dashed as cut, solid healed. What is below a thousandth of a
panel's largest gap is marked at its foot. Tables: loss above the original's by what was asked for,
with the heads that went; bold, the least of a column and its kind.
"""


def _setup(preset: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    batch, length = preset["batch_size"], preset["seq_len"]
    originals = {case["kind"]: case["original"] for case in figures["cases"]}
    lines = []
    for name, kind in preset["kinds"].items():
        units = " and ".join(
            "query heads" if u == "heads" else "KV groups" for u in preset["units"][name]
        )
        trained = (
            f" Trained here for {kind['steps']} steps of {batch} x {length} tokens."
            if kind["steps"]
            else ""
        )
        loss = originals.get(name)
        held_out = f" Held-out loss {loss:.4f} nats." if loss and name != BERT else ""
        lines.append(f"- `{name}`: {kind['what']}; {units}.{trained}{held_out}")
    seeds = ", ".join(map(str, preset["seeds"]))
    whole = cells(
        preset["units"], preset["estimators"], preset["seeds"], preset["scopes"], preset["amounts"]
    )
    lines += [
        f"- Estimators look at {preset['score_windows']} windows of {length} tokens of training "
        f"text (the standard library's source, one token per byte), `{BERT}` at "
        f"{preset['score_sentences']} sentences (first sentences of its docstrings, at most "
        f"{preset['sentence_tokens']} tokens). A seed draws the windows, the same for all "
        f"estimators, the numbers of `random`, and the order of healing; seeds: {seeds}. Weights "
        "are one set per model.",
        f"- What is lost: the label loss in nats per token, on {preset['held_out_windows']} "
        f"windows of held-out files. Of `{BERT}`, 1 - cosine between mean-pooled embeddings before "
        f"and after, a mean over {preset['held_out_sentences']} sentences of held-out files. A "
        "model's distance to itself has no gradient, so there `gate_gradient` is that of the "
        "normalised embedding along a random direction per sentence: to second order 1 - cosine is "
        "half the squared length of the embedding's change.",
        "- Pruning: `prune_heads` with the estimator's table as `scores`; `scope: global`, the "
        "lowest of all layers, or `scope: layer`, as many of each; a layer keeps one head at "
        "least. Amounts are taken to the nearest whole head or group. In a model with shared KV "
        "heads KV groups go whole (`cut: groups`), or query heads go one of every group at a time "
        "(`cut: queries`). No output projection is refitted.",
        f"- Healing: {preset['healing_steps']} steps, the same for every cut. Language models: "
        f"{batch} x {length} tokens of training text a step, distilled from the original "
        "(temperature 1, no label loss), bf16-mixed, AdamW, "
        f"{preset['healing_rate']:g} x 0.75 / hidden size. `{BERT}`: {preset['sentence_batch']} "
        "sentences a step, mean squared error to the original's last hidden states, fp32, AdamW, "
        f"{preset['sentence_rate']:g}. Linear warm-up over a tenth of the steps, cosine to 5%.",
        f"- Measured so far: {len(figures['cells'])} of the grid's {len(whole)} cells.",
    ]
    return "\n".join([*lines, ""])


def _agreement(figures: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for case in figures["cases"]:
        for name in ESTIMATORS:
            found = case["agreement"][name]
            row = [_spread(found[key]) for key in ("all", "within", "top", "low", "again")]
            row += [_spread(case["noise"][name]), _spread(case["cost"][name], 1)]
            if any(value != NOTHING for value in row):
                rows.append([case_name(case), name, *row])
    for name in ESTIMATORS:
        found = figures["overall"][name]
        row = [_median(found[key]) for key in ("all", "within", "top", "low", "again", "noise")]
        row += [_median(found["cost"], 1)]
        if len(figures["cases"]) > 1 and any(value != NOTHING for value in row):
            rows.append([f"**median of {len(figures['cases'])}**", name, *row])
    return rows


def _losses(case: Mapping[str, Any]) -> list[str]:
    parts = [f"### {case_name(case)[0].upper()}{case_name(case)[1:]}\n"]
    for run, title in RUN_NAMES.items():
        curves = case["pruning"][run]
        amounts = sorted(
            {point["amount"] for curve in curves.values() for point in curve if point["removed"]}
        )
        if not amounts:
            continue
        went = {p["amount"]: p["removed"] for curve in curves.values() for p in curve}
        head = [f"{title} ({loss_name(case)})"]
        head += [f"{amount:.0%} ({went[amount]:.1%})" for amount in amounts]
        by_name = {name: {p["amount"]: p["gap"] for p in curves[name]} for name in ESTIMATORS}
        least = {a: min(g[a]["median"] for g in by_name.values() if a in g) for a in amounts}
        rows = [
            [name, *(_gap(by_name[name].get(amount), least[amount]) for amount in amounts)]
            for name in ESTIMATORS
            if by_name[name]
        ]
        parts += [*table(head, rows), ""]
    return parts if len(parts) > 1 else []


def _gap(value: Mapping[str, float] | None, least: float) -> str:
    if value is None:
        return NOTHING
    text = f"{value['median']:.4f}"
    return f"**{text}**" if value["median"] == least else text


def _limits(preset: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    kinds = list(dict.fromkeys(case["kind"] for case in figures["cases"]))
    small = [kind for kind in kinds if kind != BERT]
    absent = [kind for kind in preset["kinds"] if kind not in kinds]
    lines = [
        f"- Models so far: {len(kinds)}, of which {len(small)} language models of a few million "
        "parameters and three or four layers. In a large model single heads matter less, and more "
        "of them do the same work.",
        "- One text, Python source, and one set of weights per model; draws of windows: "
        f"{len(preset['seeds'])}.",
        "- Healing is short, and its rate is one for all, tried on a cut that lost little: what "
        "lost more heals better at a larger one. A longer healing may order the estimators in "
        "another way.",
        "- Scores are taken once, from the whole model. Cutting in rounds, with new scores in "
        "between, and refitting the output projection are not in this grid.",
    ]
    if absent:
        lines.append(f"- Not measured yet: {', '.join(f'`{kind}`' for kind in absent)}.")
    return "\n".join([*lines, ""])


def _spread(value: Mapping[str, float] | None, digits: int = 2) -> str:
    if value is None:
        return NOTHING
    middle, low, high = (f"{value[name]:.{digits}f}" for name in ("median", "low", "high"))
    return middle if low == high else f"{middle} ({low} to {high})"


def _median(value: Mapping[str, float] | None, digits: int = 2) -> str:
    return NOTHING if value is None else f"{value['median']:.{digits}f}"
