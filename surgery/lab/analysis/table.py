"""What was found of the heads, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from surgery.lab.analysis.roles import MIXED, ROLES

# Heads named per role; the others are in heads.json.
NAMED = 8
PROBES = 16


def roles_table(result: Mapping[str, Any]) -> Table:
    """Per role how many heads, and which, the clearest first."""
    table = Table(title=f"What the heads of {result['model']} do", title_justify="left")
    for column, justify in (("role", "left"), ("heads", "right"), ("layer.head (score)", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for role in (*ROLES, MIXED):
        found = [head for head in result["heads"] if head["role"] == role]
        found.sort(key=lambda head: -(head["scores"].get(role) or 0.0))
        if found:
            names = [_named(head, role) for head in found[:NAMED]]
            more = [f"+{len(found) - NAMED}"] if len(found) > NAMED else []
            table.add_row(role.replace("_", " "), str(len(found)), ", ".join(names + more))
    return table


def _named(head: Mapping[str, Any], role: str) -> str:
    name = f"{head['layer']}.{head['head']}"
    if role == MIXED:
        return name
    what = f"{head['scores'][role]:.2f}"
    if role == "positional":
        what = f"{head['offset']:+d}: {what}"
    if role == "syntactic":
        what = f"{head['relation']}: +{what}"
    return f"{name} ({what})"


def probes_table(result: Mapping[str, Any]) -> Table:
    """Per relation the best head and the best offset; those that gain most first."""
    table = Table(title="Relations: best head against best fixed offset", title_justify="left")
    table.add_column("relation")
    for column in ("pairs", "head", "accuracy", "offset", "its accuracy"):
        table.add_column(column, justify="right")
    lines = sorted(
        result["probes"].items(),
        key=lambda line: line[1]["offset"]["accuracy"] - line[1]["best"]["accuracy"],
    )
    for name, probe in lines[:PROBES]:
        best, offset = probe["best"], probe["offset"]
        table.add_row(
            name,
            str(probe["judged"]),
            f"{best['layer']}.{best['head']}",
            f"{best['accuracy']:.1%}",
            f"{offset['offset']:+d}",
            f"{offset['accuracy']:.1%}",
        )
    if len(lines) > PROBES:
        table.caption = f"{len(lines) - PROBES} more in heads.json"
    return table
