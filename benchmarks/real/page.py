"""The page, from the results file alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.real.reasons import NOTES, REASONS
from benchmarks.real.rows import (
    AMOUNTS,
    ELIMINATION,
    ESTIMATORS,
    HEALED_PRUNINGS,
    ORIGINAL,
    PROMPT,
    name_cut,
)
from benchmarks.real.targets import (
    compute_gap,
    compute_rise,
    compute_share,
    find_roles_order,
    get_median,
)
from benchmarks.shared.markdown import NOTHING, table
from benchmarks.shared.overrides import QUIET
from surgery.lab.report.quantities import format_duration
from surgery.units import format_bytes

NOT_RUN = "not run"
# Stages whose cost is worth a line, and the rows that show it.
_COSTS = ("calibrate", "score", "analyze", "train")
_COSTLY = ("gqa", "scores", "roles", "heal", "objectives")
# The most parts of a window that a table of positions has.
_PARTS = 8

Rows = Mapping[str, Mapping[str, Any]]


def write_page(figures: Mapping[str, Any], results: str, pictures: Mapping[str, str]) -> str:
    """Markdown.

    Args:
        results: name of the file that `figures` are kept in.
        pictures: by name, those that there are, as paths from the page.
    """
    rows: Rows = {row["name"]: row for row in figures["rows"]}
    parts = [
        *_introduce(figures, rows, results),
        "## Targets\n",
        *_list_targets(figures, rows),
        "\n## Fewer KV heads\n",
        *_show(pictures, "merge", "Loss above the original's by merge and text, as cut and healed"),
        *_tabulate_merges(rows),
        "\n## Fewer heads\n",
        *_show(pictures, "pruning", "Loss above the original's by share of heads removed"),
        *_tabulate_pruning(rows),
        "\n## Healing\n",
        *_show(pictures, "healing", "Held-out loss while healing"),
        *_tabulate_healing(rows),
        "\n## A longer context\n",
        *_show(pictures, "rope", "Loss by position"),
        *_tabulate_positions(rows),
        "\n## Speed: backends, fused projections, monitors\n",
        *_tabulate_speed(rows),
        "\n## What heads do\n",
        *_tell_roles(rows),
        "\n## What it costs\n",
        *_tabulate_costs(figures, rows),
        *_list_failures(figures, rows),
        "\n## The commands\n",
        *_list_commands(rows),
        "\n## Machine\n",
        *_describe_runs(figures),
    ]
    return "\n".join(parts).rstrip("\n") + "\n"


def _introduce(figures: Mapping[str, Any], rows: Rows, results: str) -> list[str]:
    model, sizes = figures["model"], figures["sizes"]
    done = sum(any(r["status"] == "done" for r in row["records"]) for row in rows.values())
    original = get_median(rows, ORIGINAL, "loss")
    loss = NOT_RUN if original is None else f"{original:.4f} nats per token"
    return [
        "# On a real model\n",
        "<!-- Written by `python -m benchmarks.real --page --results "
        f"benchmarks/results/{results}`; do not edit. -->\n",
        f"Every headline on {model['name']} (`{model['override']}`): width {model['width']}, "
        f"{model['kv_heads']} KV heads per layer, {model['positions']:,} positions. All losses are "
        "nats per token of the same held-out text, files of Python's standard library that "
        f"nothing is fitted to: {sizes['held_out']} windows of {sizes['seq_len']} tokens, "
        f"{sizes['held_out'] * sizes['seq_len']:,} in all. The original's is {loss}. Where text is "
        "sampled, figures are medians over the seeds that were run.\n",
        f"{done} of {len(rows)} rows have been run. `make real` runs what is absent, and this page "
        f"is written from `benchmarks/results/{results}` ({figures['date']}).\n",
        *([f"{NOTES[results]}\n"] if results in NOTES else []),
    ]


def _list_targets(figures: Mapping[str, Any], rows: Rows) -> list[str]:
    lines, reasons = [], []
    known = REASONS.get(figures["model"]["name"], {})
    for target in figures["targets"]:
        value, unit = target["value"], target["unit"]
        verdict = {None: NOT_RUN, True: "yes", False: "**no**"}[target["reached"]]
        row = target["row"]
        command = f"`python -m benchmarks.real --only {row}`" if row else "all of healing's"
        lines.append(
            [
                target["what"],
                _format(target["at_most"], unit),
                NOT_RUN if value is None else _format(value, unit),
                verdict,
                _count_seeds(rows, row) if row else "",
                command,
            ]
        )
        if target["reached"] is False:
            reason = known.get(target["name"], "the reason has not been found yet")
            reasons.append(f"- {target['what']}: {reason}.")
    head = ["figure", "at most", "came out", "reached", "seeds", "command"]
    missed = ["\nWhy not:\n", *reasons] if reasons else []
    return [*table(head, lines), *missed]


def _tabulate_merges(rows: Rows) -> list[str]:
    lines = []
    for name in _in_section(rows, "gqa"):
        lines.append(
            [
                rows[name]["what"],
                *_loss_cells(rows, name),
                _share(compute_share(rows, name, "gqa-mean")),
                _bytes(get_median(rows, name, "kv_bytes_per_token")),
                _or_nothing(_first(rows, name, "format")),
                _percent(compute_rise(rows, f"heal-{name}")),
                _count_seeds(rows, name),
            ]
        )
    head = ["KV heads per layer", "loss", "above", "share of the loss", "of mean pooling's gap"]
    head += ["KV bytes per token", "export", "healed", "seeds"]
    return table(head, lines)


def _tabulate_pruning(rows: Rows) -> list[str]:
    lines = []
    for estimator in (ELIMINATION, *ESTIMATORS):
        for refit in (False, True):
            if estimator == ELIMINATION and not refit:
                continue
            names = [name_cut(estimator, amount, refit) for amount in AMOUNTS]
            cells = [_percent(compute_rise(rows, name)) for name in names]
            seeds = max((_count_seeds(rows, name) for name in names), default="0")
            lines.append([estimator, "yes" if refit else "no", *cells, seeds])
    head = ["estimator", "refit", *(f"{amount}%" for amount in AMOUNTS), "seeds"]
    return [
        "Loss above the original's, as cut; whole KV groups, the lowest of all layers.\n",
        *table(head, lines),
    ]


def _tabulate_healing(rows: Rows) -> list[str]:
    lines = []
    for section in ("heal", "objectives", "rates"):
        for name in _in_section(rows, section):
            before, after = get_median(rows, name, "loss_before"), get_median(rows, name, "loss")
            rate, step = get_median(rows, name, "lr"), get_median(rows, name, "kept_step")
            last = get_median(rows, name, "last_loss")
            lines.append(
                [
                    rows[name]["what"],
                    _number(before),
                    _number(after),
                    _percent(compute_rise(rows, name)),
                    NOTHING if rate is None else f"{rate:.2g}",
                    NOTHING if step is None else f"{step:g}",
                    NOTHING if last is None else f"{last:.4f}",
                    _count_seeds(rows, name),
                ]
            )
    head = ["from, and how", "before", "after", "above the original's", "rate", "kept step"]
    head += ["loss after the last step", "seeds"]
    return [
        "Kept are the weights with the lowest loss on other held-out windows than those that all "
        "losses here are of; if they do worse on these than the model before healing, that is "
        "kept: step 0.\n",
        *table(head, lines),
    ]


def _tabulate_positions(rows: Rows) -> list[str]:
    names = _in_section(rows, "rope")
    parts = {name: merge_parts(_first(rows, name, "by_position"), _PARTS) for name in names}
    known = next((found for found in parts.values() if found), None)
    spans = [f"{first:,} to {last:,}" for first, last, _ in known] if known else []
    lines = []
    for name in names:
        cells = [_number(loss) for _, _, loss in parts[name]] or [NOTHING] * len(spans)
        lines.append([rows[name]["what"], _loss_cells(rows, name)[0], *cells])
    text = "One long window, so parts differ by their text too: compare within a column.\n"
    return [text, *table(["scaling", "loss", *spans], lines)]


def merge_parts(found: Any, most: int) -> list[tuple[int, int, float | None]]:
    """Merge neighbours until there are at most so many parts; their lengths are alike."""
    parts = [(first, last, loss) for first, last, loss in found or ()]
    while len(parts) > most and len(parts) % 2 == 0:
        parts = [
            (a[0], b[1], None if a[2] is None or b[2] is None else (a[2] + b[2]) / 2)
            for a, b in zip(parts[::2], parts[1::2], strict=True)
        ]
    return parts


def _tabulate_speed(rows: Rows) -> list[str]:
    lines = []
    for name in _in_section(rows, "speed"):
        if name == "monitors":
            continue
        difference = get_median(rows, name, "loss_difference")
        lines.append(
            [
                rows[name]["what"],
                _state(rows, name) if difference is None else f"{difference:+.1e}",
                _times(get_median(rows, name, "prefill_ratio")),
                _times(get_median(rows, name, "decode_ratio")),
                _or_nothing(_first(rows, name, "format")),
            ]
        )
    head = ["what", "change of the loss", "prefill, times as fast", "decoding, times as fast"]
    ratio = get_median(rows, "monitors", "observed_ratio_of_medians")
    overhead = get_median(rows, "monitors", "overhead_at_default_cadence")
    watched = (
        f"Monitors: {NOT_RUN}."
        if ratio is None or overhead is None
        else f"Monitors: a training step that is observed takes {ratio:.2f} times as long as its "
        f"neighbour that is not (medians); at the default cadence that is {overhead:+.1%} on "
        "average."
    )
    return [*table([*head, "export"], lines), "", watched]


def _tell_roles(rows: Rows) -> list[str]:
    roles = find_roles_order(rows)
    if roles is None:
        return [f"{_state(rows, 'roles')}."]
    head = ["role", "heads", "median depth", "layers", "strongest", "its score"]
    lines = [
        [
            role.replace("_", " "),
            str(one["heads"]),
            f"{one['depth']:.2f}",
            f"{one['first_layer']} to {one['last_layer']}",
            NOTHING if one["score"] is None else ".".join(map(str, one["best"])),
            NOTHING if one["score"] is None else f"{one['score']:.2f}",
        ]
        for role, one in sorted(roles.items(), key=lambda item: -item[1]["heads"])
    ]
    return [
        "Depth is the layer as a share of the last one's number. Induction needs a head that "
        "attends to the previous token in an earlier layer (Olsson et al. 2022, "
        "arXiv:2209.11895).\n",
        *table(head, lines),
        "",
        _judge_induction(roles),
    ]


def _judge_induction(roles: Mapping[str, Any]) -> str:
    induction, previous = roles.get("induction"), roles.get("previous_token")
    if induction is None:
        return "No head is an induction head by the threshold of the analysis."
    if previous is None:
        return (
            f"{induction['heads']} heads are induction heads; none attends to the previous token "
            "by its threshold, though they need one."
        )
    holds = previous["first_layer"] < induction["first_layer"]
    return (
        f"{induction['heads']} heads are induction heads, the first in layer "
        f"{induction['first_layer']}; the first that attends to the previous token is in layer "
        f"{previous['first_layer']}, {'before' if holds else '**not before**'} it"
        f"{', as the literature says' if holds else ', other than the literature says'}."
    )


def _tabulate_costs(figures: Mapping[str, Any], rows: Rows) -> list[str]:
    original = get_median(rows, ORIGINAL, "prefill_ms")
    prompt = min(PROMPT, figures["sizes"]["seq_len"])
    per_token = None if original is None else original / 1000 / prompt
    lines = []
    for name, row in rows.items():
        if row["section"] not in _COSTLY and name not in HEALED_PRUNINGS:
            continue
        for stage in _COSTS:
            found = [
                cost
                for record in row["records"]
                if record["status"] == "done"
                for cost in record["costs"]
                if cost["stage"] == stage
            ]
            if not found:
                continue
            seconds = median(cost["seconds"] for cost in found)
            peaks = [cost["process"] or cost["gpu"] for cost in found]
            peak = max((value for value in peaks if value), default=None)
            passes = seconds / (per_token * row["seen"]) if per_token and row["seen"] else None
            lines.append(
                [
                    row["what"],
                    stage,
                    format_duration(seconds),
                    f"{row['seen']:,}" if row["seen"] else NOTHING,
                    NOTHING if passes is None else f"{passes:.1f}",
                    _bytes(peak),
                ]
            )
    head = ["what", "stage", "took", "tokens of text", "forward passes over them", "peak memory"]
    text = (
        "Passes: the time, by that of one forward pass over the same text (prefill of the "
        "original). Memory is what the process holds at most, libraries included.\n"
    )
    return [text, *table(head, lines)] if lines else [NOT_RUN]


def _list_failures(figures: Mapping[str, Any], rows: Rows) -> list[str]:
    lines, known = [], REASONS.get(figures["model"]["name"], {})
    for name, row in rows.items():
        for record in row["records"]:
            if record["status"] == "failed":
                reason = known.get(name)
                why = f" {reason}." if reason else ""
                lines.append(f"- `{name}`, seed {record['seed']}: {record['error']}.{why}")
    return ["\n## What failed\n", *lines] if lines else []


def _list_commands(rows: Rows) -> list[str]:
    quiet = " ".join(QUIET)
    lines = [
        "In order; a row takes up what the rows before it have left. `seed=0` stands for every "
        "seed.\n",
        f'    QUIET="{quiet}"\n',
    ]
    for name, row in rows.items():
        lines += [
            f"`{name}`: {row['what']}\n",
            *(f"    {one.replace(quiet, '$QUIET')}" for one in row["commands"]),
            "",
        ]
    return lines[:-1]


def _describe_runs(figures: Mapping[str, Any]) -> list[str]:
    lines = []
    for run in figures["runs"] or [figures]:
        machine, versions = run["machine"], run["versions"]
        gpu = f", {machine['gpu']}" if machine["gpu"] else ""
        lines.append(
            f"{machine['cpu']}, {machine['cpus']} CPUs, {machine['threads']} threads{gpu}; Python "
            f"{machine['python']}, torch {versions['torch']}, transformers "
            f"{versions['transformers']}."
        )
    return list(dict.fromkeys(lines))


def _show(pictures: Mapping[str, str], name: str, what: str) -> Iterator[str]:
    if name in pictures:
        yield f"![{what}]({pictures[name]})\n"


def _in_section(rows: Rows, section: str) -> list[str]:
    return [name for name, row in rows.items() if row["section"] == section]


def _first(rows: Rows, name: str, figure: str) -> Any:
    for record in rows[name]["records"]:
        if record["status"] == "done":
            return record["figures"].get(figure)
    return None


def _state(rows: Rows, name: str) -> str:
    records: Sequence[Mapping[str, Any]] = rows[name]["records"]
    return "failed" if any(record["status"] == "failed" for record in records) else NOT_RUN


def _loss_cells(rows: Rows, name: str) -> list[str]:
    """Loss, loss above the original's, and that as a share."""
    loss, gap = get_median(rows, name, "loss"), compute_gap(rows, name)
    if loss is None:
        return [_state(rows, name), NOTHING, NOTHING]
    above = NOTHING if gap is None else f"{gap:+.4f}"
    return [f"{loss:.4f}", above, _percent(compute_rise(rows, name))]


def _count_seeds(rows: Rows, name: str) -> str:
    records = rows.get(name, {}).get("records", ())
    return str(sum(record["status"] == "done" for record in records))


def _format(value: float, unit: str) -> str:
    if unit == "seconds":
        return format_duration(value)
    return {"ratio": f"{value:.3f}", "share": f"{value:+.1%}", "nats": f"{value:+.4f}"}[unit]


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return NOT_RUN if value is None else f"{value:+.1%}"


def _share(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def _times(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"


def _bytes(value: float | None) -> str:
    return NOTHING if value is None else format_bytes(value)


def _or_nothing(value: Any) -> str:
    return NOTHING if value is None else str(value)
