"""The README.md of an exported model."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from surgery.report.summary import versions

if TYPE_CHECKING:
    from surgery.pipeline.session import Session


def model_card(session: Session) -> str:
    """Markdown: what the model is, what it was trained on, and how well it does."""
    run, plan, training = session.run, session.plan, session.training
    lines = [
        "---",
        "library_name: transformers",
        "---",
        "",
        f"# {plan.model['class']} by attention surgery",
        "",
        f"Source: `{plan.model['name']}`.",
        "",
    ]
    if plan.operations:
        lines += ["Operations, in order:", ""]
        for spec in plan.operations:
            options = ", ".join(
                f"{k}={v}" for k, v in spec.items() if k != "operation" and v is not None
            )
            lines.append(f"- `{spec['operation']}`: {options}")
        lines.append("")
    if training:
        lines += [
            "## Training",
            "",
            f"- data: `{run.data.kind.value}` {run.data.path or ''}".rstrip(),
            f"- objective: {training['objective']}",
            f"- steps: {training['steps']} ({training['tokens']:,} tokens, windows of "
            f"{run.data.seq_len})",
            f"- optimizer: {run.optim.name.value}, learning rate {run.optim.lr:g}",
            f"- seed: {run.seed}",
            f"- Python {platform.python_version()}, "
            + ", ".join(f"{name} {version}" for name, version in versions().items()),
            "",
        ]
    if session.measurements:
        lines += [
            "## Held-out text",
            "",
            "| | loss (nats per token) | perplexity |",
            "| --- | --- | --- |",
        ]
        for moment, figures in session.measurements.items():
            name = moment.replace("_", " ")
            lines.append(f"| {name} | {figures.loss:.4f} | {figures.perplexity:.3f} |")
        lines.append("")
    return "\n".join(lines)
