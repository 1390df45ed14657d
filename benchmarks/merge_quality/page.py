"""The page: targets first, then every cell's medians."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.merge_quality.figures import find
from benchmarks.merge_quality.grid import MERGES, NO_TRAINING, ORIGINAL, cells
from benchmarks.merge_quality.rates_page import rates_section
from benchmarks.merge_quality.targets_page import targets_table
from benchmarks.shared.markdown import NOTHING, runs_said, table
from benchmarks.shared.settings import warmup_steps

Groups = Sequence[Mapping[str, Any]]


def page(figures: Mapping[str, Any], page_at: Path, picture: Path) -> str:
    """Markdown of the derived `figures`."""
    preset, groups = figures["preset"], figures["groups"]
    measured = [cell for cell in figures["cells"] if cell.get("rate") is None]
    shown = os.path.relpath(picture, page_at.parent)
    parts = [
        _HEAD.format(picture=shown, entropy_rows=preset["entropy_rows"]),
        _setup(preset, measured),
        "## Targets\n",
        targets_table(figures["targets"]),
        *(rates_section(figures) if "at_best" in figures else ()),
        "## The models, and how far they come without surgery\n",
        _originals(preset, measured),
        *(_ratio(preset, groups, ratio) for ratio in preset["ratios"]),
        "## Runs\n",
        runs_said(figures["runs"], "merge_quality.json"),
    ]
    return "\n".join(parts)


_HEAD = """\
# Merging KV heads

<!-- Written by `python -m benchmarks.merge_quality --render`; do not edit. -->

A model's KV heads are merged in one of several ways, to several ratios, and healed for none, 1% or
5% of the tokens the model itself was trained on. What is lost, and what comes back?

    python -m benchmarks.merge_quality                # what is missing, best first; may be cut off
    python -m benchmarks.merge_quality --workers 2    # two processes side by side
    python -m benchmarks.merge_quality --rates 1 0.5 0.2   # other healing rates, after the grid
    python -m benchmarks.merge_quality --quick        # a tiny model, in a minute
    python -m benchmarks.merge_quality --render       # this page and the picture, from the cells

![What is left of the gap, by merge and tokens of healing]({picture})

Thick lines are medians over models of the median over seeds, thin ones the models. A distilled
model is held against the original, one trained on text against the control. What is left below
0.001 is marked at 0.001.

In words:

- **loss**: nats per token (a byte) on held-out text. **gap**: loss minus the original's.
- **KL**: KL(original || converted), nats per token. **top-1**: share of tokens whose likeliest
  value is the original's. **entropy**: of attention, nats, a mean over heads, layers, windows and
  {entropy_rows} query rows drawn per batch. All on the same windows for every model.
- **control**: the original itself, not converted, trained on with objective `lm` for as many tokens
  at the same rate; with no training, the original. A model that was not trained to its end gets
  better by training on alone (or, where a fresh warm-up disturbs it, worse), whatever was done to
  its heads. So gaps are given against the original and against the control.
- **closed**: 1 - gap / gap of `mean` at the same ratio with no training. Above 100%: better than
  what it is held against. Nothing is clamped.
- Figures over seeds are medians, figures over models medians of those. A share of a gap that is
  zero or less is no number and left out ({nothing}).
""".replace("{nothing}", NOTHING)


def _setup(preset: Mapping[str, Any], measured: Groups) -> str:
    batch, length = preset["batch_size"], preset["seq_len"]
    lines = ["How it is measured:", ""]
    for kind in preset["kinds"].values():
        tokens = kind["steps"] * batch * length
        healing = ", ".join(
            f"{share:.0%} is {(steps := max(1, round(share * kind['steps'])))} steps "
            f"(warm-up {warmup_steps(steps)})"
            for share in preset["shares"]
            if share
        )
        lines.append(
            f"- `{kind['name']}`: {kind['what']}; trained for {kind['steps']} steps, "
            f"{tokens:,} tokens; {healing}."
        )
    merges = {cell["merge"] for cell in measured}
    absent = [merge for merge in preset["merges"] if merge not in merges]
    lines += [
        f"- Healing: batches of {batch} x {length} tokens, bf16-mixed, the project's AdamW. Its "
        f"rate as a share of 0.75 / hidden size: {_rates(preset)}, what was best of a few tried on "
        "one model (`--rates` tries others on all); the control's is that of `optimal`. Linear "
        "warm-up over a tenth of the steps (2 to 10), cosine to 5% of the rate; each "
        "length is a run of its own with its own schedule. `distill`: temperature 1, no label "
        "loss.",
        "- Text: the standard library's source, one token per byte. A model of seed s was trained "
        "on windows in the order of seed s, and heals on the first of that order: text it has "
        "seen. The model that ships has one set of weights; its seeds are orders of healing and "
        "calibration only.",
        f"- Calibration, for merges that look at text: {preset['calibration_windows']} windows of "
        "training text, those that healing begins with. Held out: "
        f"{preset['held_out_windows']} windows of other files.",
    ]
    whole = cells(
        list(preset["kinds"]),
        preset["seeds"],
        preset["merges"],
        preset["ratios"],
        preset["shares"],
        preset["objectives"],
        preset["healed_seeds"],
    )
    lines.append(
        f"- Measured so far: {len(measured)} of the grid's {len(whole)} cells; a run goes "
        "on where the last was cut off. With no training all seeds "
        f"({', '.join(map(str, preset['seeds']))}), healed "
        f"{', '.join(map(str, preset['healed_seeds']))} alone, unless `--seeds` asks for more. How "
        "many seeds a model has shows in the table of models."
    )
    if absent:
        lines.append(f"- Not measured yet: {', '.join(f'`{merge}`' for merge in absent)}.")
    return "\n".join([*lines, ""])


def _rates(preset: Mapping[str, Any]) -> str:
    rates = {name: preset["rates"].get(name, 1.0) for name in preset["merges"]}
    by_rate: dict[float, list[str]] = {}
    for name, rate in rates.items():
        by_rate.setdefault(rate, []).append(f"`{name}`")
    return "; ".join(f"{rate:g} for {', '.join(names)}" for rate, names in by_rate.items())


def _originals(preset: Mapping[str, Any], measured: Groups) -> str:
    """Seed by seed, for a control is held against the very model that it was."""
    shares = [share for share in preset["shares"] if share]
    found = {
        (cell["kind"], cell["seed"], cell["share"], cell["objective"]): cell
        for cell in measured
        if cell["merge"] == ORIGINAL
    }
    head = ["model", "seed", "loss", "entropy"]
    head += [f"control's loss, {share:.0%}" for share in shares]
    rows = []
    for kind in preset["kinds"]:
        for seed in preset["seeds"]:
            cell = found.get((kind, seed, 0.0, NO_TRAINING))
            if cell is None:
                continue
            controls = [found.get((kind, seed, share, "lm"), {}) for share in shares]
            rows.append(
                [kind, str(seed), _f(cell["loss"]), _f(cell["entropy"], 3)]
                + [_f(control.get("loss")) for control in controls]
            )
    return "\n".join([*table(head, rows), ""])


def _ratio(preset: Mapping[str, Any], groups: Groups, ratio: str) -> str:
    name = "one KV head (MQA)" if ratio == "MQA" else f"{ratio}"
    parts = [f"## {name[0].upper()}{name[1:]}", "", "### No training", ""]
    parts += [*_untrained(preset, groups, ratio), ""]
    for objective in reversed(preset["objectives"]):
        for share in reversed([share for share in preset["shares"] if share]):
            table = _healed(preset, groups, ratio, share, objective)
            if table:
                parts += [f"### Healed on {share:.0%}, {objective}", "", *table, ""]
    return "\n".join(parts)


def _untrained(preset: Mapping[str, Any], groups: Groups, ratio: str) -> list[str]:
    head = ["model", "merge", "gap", "lowest to highest", "of mean's", "of aligned_renorm's"]
    head += ["KL", "top-1", "entropy"]
    rows = []
    for merge, kind, found, spread in _lines(preset, groups, ratio, 0.0, NO_TRAINING):
        rows.append(
            [
                kind,
                merge,
                _f(found["gap"]),
                _span(spread, "gap"),
                _f(found["share_of_mean"], 3),
                _f(found["share_of_aligned_renorm"], 3),
                _f(found["kl"]),
                _p(found["agreement"]),
                _f(found["entropy"], 3),
            ]
        )
    return table(head, rows) if rows else ["Nothing measured."]


def _healed(
    preset: Mapping[str, Any], groups: Groups, ratio: str, share: float, objective: str
) -> list[str]:
    head = ["model", "merge", "gap to the original", "lowest to highest", "closed", "of mean's"]
    head += ["gap to the control", "closed", "of mean's"]
    head += ["KL", "of mean's", "top-1", "entropy"]
    rows = []
    for merge, kind, found, spread in _lines(preset, groups, ratio, share, objective):
        row = [kind, merge, _f(found["gap"]), _span(spread, "gap")]
        row += [_p(found["closed"]), _f(found["share_of_mean"], 3)]
        row += [_f(found["gap_control"]), _p(found["closed_control"])]
        row += [_f(found["share_of_mean_control"], 3), _f(found["kl"])]
        row += [_f(found["kl_share_of_mean"], 3), _p(found["agreement"])]
        rows.append([*row, _f(found["entropy"], 3)])
    return table(head, rows) if rows else []


def _lines(
    preset: Mapping[str, Any], groups: Groups, ratio: str, share: float, objective: str
) -> list[tuple[str, str, Mapping[str, Any], Mapping[str, Any] | None]]:
    """Merge, model, its figures and their range; after the models of a merge their median."""
    found = []
    for merge in MERGES:
        group = find(groups, merge, ratio, share, objective)
        if group is None:
            continue
        kinds = [kind for kind in preset["kinds"] if kind in group["kinds"]]
        found += [(merge, k, group["kinds"][k], group["spread"][k]) for k in kinds]
        if len(kinds) > 1:
            found.append((merge, f"**median of {len(kinds)}**", group["all"], None))
    return found


def _f(value: float | None, digits: int = 4) -> str:
    return NOTHING if value is None else f"{value:.{digits}f}"


def _p(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1%}"


def _span(spread: Mapping[str, Any] | None, name: str) -> str:
    if spread is None or spread[name] is None:
        return NOTHING
    low, high = spread[name]
    return f"{low:.4f} to {high:.4f}"
