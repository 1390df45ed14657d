"""Show a plan as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from surgery.models.sites import Site
from surgery.plan.plan import Plan
from surgery.units import format_bytes, format_count, format_ratio


def build_plan_table(plan: Plan) -> Table:
    """Build a table: before and after side by side, and how the result can be saved."""
    model = plan.model
    table = Table(title=f"Plan for {model['name']} ({model['class']})", title_justify="left")
    for column in ("", "before", "after", "ratio"):
        table.add_column(column, justify="left" if column == "" else "right")
    before, after = plan.sizes_before, plan.sizes_after
    if plan.conversion is not None:
        table.add_row("architecture", str(model["model_type"]), str(plan.conversion["into"]), "")
    for name, attribute in (("query heads", "q_heads"), ("KV heads", "kv_heads")):
        heads = format_by_layer(plan.source, attribute), format_by_layer(plan.after, attribute)
        table.add_row(name, *heads, "")
    if any(site.window is not None for site in (*plan.source, *plan.after)):
        windows = format_by_layer(plan.source, "window"), format_by_layer(plan.after, "window")
        table.add_row("window, tokens", *windows, "")
    table.add_row(
        "parameters",
        format_count(before.parameters),
        format_count(after.parameters),
        format_ratio(before.parameters, after.parameters),
    )
    table.add_row(
        f"KV cache, {plan.tokens} tokens",
        format_bytes(before.kv_bytes),
        format_bytes(after.kv_bytes),
        format_ratio(before.kv_bytes, after.kv_bytes),
    )
    table.add_row(
        f"attention FLOPs, {plan.tokens} tokens",
        format_count(before.attention_flops),
        format_count(after.attention_flops),
        format_ratio(before.attention_flops, after.attention_flops),
    )
    table.add_section()
    for spec, outcome in zip(plan.operations, plan.outcomes, strict=True):
        options = ", ".join(
            f"{k}={v}" for k, v in spec.items() if k != "operation" and v is not None
        )
        table.add_row(f"operation {spec['operation']}", options, outcome, "")
    if plan.calibration is not None:
        _add_calibration(table, plan.calibration)
    table.add_row("export", plan.export.format, ", ".join(plan.export.runtimes), "")
    for runtime, why in plan.export.without.items():
        table.add_row(f"not for {runtime}", why, "", "")
    if plan.left_alone:
        first = plan.left_alone[0]
        blocks = f"{len(plan.left_alone)} attention blocks"
        table.add_row("left alone", f"{first.path}, …: {first.reason}", blocks, "")
    undecided = [f"left open: {decision}" for decision in plan.open_decisions]
    table.caption = "\n".join([*plan.notes, *undecided, plan.export.reason])
    return table


def _add_calibration(table: Table, calibration: Mapping[str, Any]) -> None:
    """Add what was looked at, and how far predictions and outputs were off."""
    tokens = f"{calibration['tokens']:,} tokens"
    unknown = calibration.get("tokens_per_unknown")
    each = "" if unknown is None else f"{unknown:g} for each unknown of an output"
    table.add_row("calibrated on", tokens, each, "")
    chosen = calibration.get("chosen")
    if chosen is not None:
        name = f"chosen by {chosen['operation']['operation']}"
        table.add_row(name, f"{chosen['operation']['target']}", f"KL {chosen['kl']:.3g}", "")
    for operation in calibration["operations"]:
        joint = operation.get("joint")
        if joint is not None and "skipped" in joint:
            table.add_row(f"KL after {operation['operation']}", "", f"left: {joint['skipped']}", "")
        elif joint is not None:
            table.add_row(
                f"KL after {operation['operation']}",
                f"{joint['kl_before']:.3g}",
                f"{joint['kl_after']:.3g} all layers fitted together, held out",
                "",
            )
        sites = [site for site in operation["sites"].values() if "output_error_held_out" in site]
        if not sites:
            continue
        before, fitted, held_out = (
            sum(site.get(name, site.get("output_error_cut", 0.0)) for site in sites) / len(sites)
            for name in ("output_error_merged", "output_error_refit", "output_error_held_out")
        )
        after = f"{fitted:.1%} fitted, {held_out:.1%} held out"
        table.add_row(f"output error of {operation['operation']}", f"{before:.1%}", after, "")


def format_by_layer(sites: Sequence[Site], attribute: str) -> str:
    """``8`` where all layers agree, else runs of layers: ``8 (0-1), 2 (2-3)``; ``all`` for none."""
    values = [getattr(site, attribute) for site in sites]
    counts = ["all" if value is None else value for value in values]
    if len(set(counts)) <= 1:
        return str(counts[0]) if counts else "-"
    runs: list[list[Any]] = []  # [count, first layer, last layer]
    for layer, count in enumerate(counts):
        if runs and runs[-1][0] == count:
            runs[-1][2] = layer
        else:
            runs.append([count, layer, layer])
    return ", ".join(f"{n} ({a}-{b})" if a != b else f"{n} ({a})" for n, a, b in runs)
