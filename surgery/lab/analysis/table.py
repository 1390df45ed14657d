"""Tables of the result for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from surgery.lab.analysis.roles import MIXED, ROLES

# Heads named per role; the others are in heads.json.
NAMED = 8
PROBES = 16


def make_roles_table(result: Mapping[str, Any]) -> Table:
    """Make a table with the number of heads per role, and their names, the clearest first."""
    table = Table(title=f"What the heads of {result['model']} do", title_justify="left")
    for column, justify in (("role", "left"), ("heads", "right"), ("layer.head (score)", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for role in (*ROLES, MIXED):
        heads = [head for head in result["heads"] if head["role"] == role]
        heads.sort(key=lambda head: -(head["scores"].get(role) or 0.0))
        if heads:
            names = [_format_head(head, role) for head in heads[:NAMED]]
            more = [f"+{len(heads) - NAMED}"] if len(heads) > NAMED else []
            table.add_row(role.replace("_", " "), str(len(heads)), ", ".join(names + more))
    return table


def _format_head(head: Mapping[str, Any], role: str) -> str:
    name = f"{head['layer']}.{head['head']}"
    if role == MIXED:
        return name
    what = f"{head['scores'][role]:.2f}"
    if role == "positional":
        what = f"{head['offset']:+d}: {what}"
    if role == "syntactic":
        what = f"{head['relation']}: +{what}"
    return f"{name} ({what})"


def make_probes_table(result: Mapping[str, Any]) -> Table:
    """Make a table with the best head and offset per relation, the largest gain first."""
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
