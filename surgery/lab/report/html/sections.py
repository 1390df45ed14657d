"""The parts of a report that are tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery.lab.report.figures import MOMENT_NAMES, ROWS
from surgery.lab.report.html.data import RunFiles
from surgery.lab.report.html.layers import layers_table
from surgery.lab.report.html.markup import Markup, bar, fold, join, table, tag
from surgery.lab.report.html.quantities import change, duration, options, signed
from surgery.lab.report.summary import MOMENTS


def results(run: RunFiles) -> Markup | None:
    """Every measured figure at every measured moment."""
    moments = [moment for moment in MOMENTS if run.summary.get(moment)]
    if not moments:
        return None
    names = [MOMENT_NAMES[m] if run.operations else m.replace("_", " ") for m in moments]
    rows = []
    for field, (label, shown) in ROWS.items():
        values = [run.summary[moment].get(field) for moment in moments]
        if any(value is not None for value in values):
            figures = ["\N{EN DASH}" if value is None else shown(value) for value in values]
            last = [change(values[0], values[-1])] if len(moments) > 1 else []
            rows.append([label, *figures, *last])
    head = ["", *names, *(["change"] if len(moments) > 1 else [])]
    return table(head, rows, "Before and after")


def plan(run: RunFiles) -> Markup | None:
    """What was asked for, and what it comes to in each layer."""
    if not run.operations:
        return None
    steps = [
        tag("li", tag("code", spec["operation"]), " ", tag("span", options(spec), class_="quiet"))
        for spec in run.operations
    ]
    said = [tag("ol", steps, class_="operations"), layers_table(run.plan)]
    export = run.summary.get("export") or run.plan.get("export")
    if export:
        said.append(tag("p", "Export: ", tag("b", export["format"]), ", ", export["reason"], "."))
    patch = run.plan.get("config_patch")
    if patch:
        lines = "\n".join(f"{key}: {value}" for key, value in patch.items())
        said.append(fold("What changes in the model's config", tag("pre", lines, tabindex=0)))
    return join(said)


def calibration(run: RunFiles) -> Markup | None:
    """Per layer, what calibration lost: every figure it kept, as a share."""
    found = run.summary.get("calibration") or {}
    parts = []
    for operation in found.get("operations") or []:
        sites = operation.get("sites") or {}
        names: dict[str, None] = {}
        for site in sites.values():
            names |= {key: None for key, value in site.items() if isinstance(value, float)}
        if not names:
            continue
        rows = []
        for path, site in sites.items():
            cells = [_share(site.get(name)) for name in names]
            rows.append([path, *cells])
        head = ["site", *(_CALIBRATED.get(name, name.replace("_", " ")) for name in names)]
        kind = str(operation.get("operation"))
        parts.append(table(head, rows, f"Errors of {kind} by layer"))
    if not parts:
        return None
    said = f"Shares lost, on {found['tokens']:,} tokens in {found['batches']} batches."
    return join(tag("p", said, class_="quiet"), parts)


_CALIBRATED = {
    "keys": "keys, closed form",
    "values": "values, closed form",
    "output_closed_form": "output, closed form",
    "output_refined": "output, refined",
    "output_error_cut": "output, heads cut",
    "output_error_refit": "output, solved anew",
}


def _share(value: float | None) -> Markup:
    if value is None:
        return join("\N{EN DASH}")
    return tag("span", bar(value), tag("span", f"{value:.1%}"), class_="measured")


def probes(run: RunFiles) -> Markup | None:
    """Per relation, the best head against the best fixed offset."""
    found = run.analysis.get("probes") or {}
    rows = []
    for relation, probe in found.items():
        best, offset = probe.get("best") or {}, probe.get("offset") or {}
        more = None
        if best and offset:
            more = signed(100 * (best["accuracy"] - offset["accuracy"]), 0)
        rows.append(
            [
                relation,
                probe.get("source", ""),
                f"{probe.get('pairs', 0):,}",
                f"{best['layer']}.{best['head']}" if best else "\N{EN DASH}",
                _accuracy(best),
                _accuracy(offset),
                f"{offset['offset']:+d}".replace("-", "\N{MINUS SIGN}") if offset else "",
                more,
            ]
        )
    if not rows:
        return None
    head = [
        "relation",
        "source",
        "pairs",
        "best head",
        "finds it",
        "fixed offset finds it",
        "offset",
        "points more",
    ]
    return table(head, rows, "Probes", text=(0, 1))


def _accuracy(found: Mapping[str, Any]) -> Markup:
    return _share(found["accuracy"] if found else None)


def tasks(run: RunFiles) -> Markup | None:
    """Losses of every task under every mask, and how far tasks agree."""
    found = run.summary.get("tasks") or {}
    parts = []
    losses = found.get("losses") or {}
    if losses:
        first, *others = losses.values()
        rows = [
            [
                task,
                f"{first[task]:.4f}",
                *(f"{row[task]:.4f} ({signed(row[task] - first[task])})" for row in others),
            ]
            for task in found["names"]
        ]
        head = ["held-out text", *(name.replace("_", " ") for name in losses)]
        parts.append(table(head, rows, "Losses of the tasks"))
    if found.get("spearman"):
        rows = [
            [name, *("\N{EN DASH}" if r is None else f"{r:.3f}" for r in row)]
            for name, row in zip(found["names"], found["spearman"], strict=True)
        ]
        parts.append(tag("h3", f"Rank correlation of {found['estimator']} scores"))
        parts.append(table(["task", *found["names"]], rows, "Agreement of the tasks"))
    return join(parts) if parts else None


def training(run: RunFiles) -> Markup | None:
    """How it was healed, as a list of facts."""
    found = run.summary.get("training") or {}
    if not found:
        return None
    facts = {
        "data": found["data"],
        "objective": found["objective"],
        "steps": f"{found['steps']:,}",
        "tokens": f"{found['tokens']:,} in windows of {found['seq_len']:,}",
        "trained": f"{found['parameters']} ({found['trainable_parameters']:,} parameters)",
        "optimizer": f"{found['optimizer']}, peak learning rate {found['lr']:.3g}",
        "seed": run.summary.get("seed"),
    }
    return _facts(facts)


def circumstances(run: RunFiles) -> Markup | None:
    """Time, machine, versions, config: to be able to do it again."""
    summary = run.summary
    parts = []
    timings = summary.get("timings") or {}
    longest = max((v for name, v in timings.items() if name != "total"), default=0.0)
    if timings:
        rows = [
            [
                name,
                None if name == "total" else bar(seconds / longest if longest else 0.0),
                duration(seconds),
            ]
            for name, seconds in timings.items()
        ]
        parts.append(tag("h3", "Time"))
        parts.append(table(["stage", "", "took"], rows, "Time by stage", text=(0, 1)))
    machine = summary.get("machine") or {}
    if machine:
        facts = {
            "CPU": f"{machine['cpu']}, {machine['cpus']} cores, {machine['threads']} threads",
            "GPU": machine["gpu"] or "none",
            "system": machine["system"],
            "Python": machine["python"],
            **(summary.get("versions") or {}),
        }
        parts.append(tag("h3", "Machine and versions"))
        parts.append(_facts(facts))
    if run.config:
        parts.append(fold("The whole config", tag("pre", run.config, tabindex=0)))
    return join(parts) if parts else None


def _facts(facts: Mapping[str, Any]) -> Markup:
    return tag(
        "dl", [tag("div", tag("dt", k), tag("dd", v)) for k, v in facts.items()], class_="facts"
    )
