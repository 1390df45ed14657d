"""The README.md of an exported model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from surgery.lab.report.healing import describe_healing, describe_text
from surgery.lab.report.quantities import format_options
from surgery.lab.report.summary import MOMENTS
from surgery.lab.report.templates import make_environment


def render_card(summary: Mapping[str, Any], outcomes: Sequence[str]) -> str:
    """Markdown: what the model is, what it was trained on, and how well it does.

    Args:
        summary: what `summary.json` holds.
        outcomes: per operation, what it came to, in words (`Plan.outcomes`).
    """
    environment = make_environment("surgery.lab.report", escape=False)
    environment.filters["options"] = format_options
    done = list(zip(summary["operations"], outcomes, strict=True))
    measured = {name.replace("_", " "): summary[name] for name in MOMENTS if summary[name]}
    healing = list(describe_healing(summary.get("training") or {}, exported=True))
    template = environment.get_template("card.md.j2")
    text = list(describe_text(summary))
    return template.render(summary, done=done, measured=measured, healing=healing, text=text)
