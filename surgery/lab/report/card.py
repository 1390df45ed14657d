"""The README.md of an exported model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery.lab.report.summary import MOMENTS


def model_card(summary: Mapping[str, Any]) -> str:
    """Markdown: what the model is, what it was trained on, and how well it does."""
    lines = [
        "---",
        "library_name: transformers",
        "---",
        "",
        f"# {summary['model']['class']} by attention surgery",
        "",
        f"Source: `{summary['model']['name']}`.",
        "",
    ]
    if summary["operations"]:
        lines += ["Operations, in order:", ""]
        for spec in summary["operations"]:
            options = ", ".join(
                f"{k}={v}" for k, v in spec.items() if k != "operation" and v is not None
            )
            lines.append(f"- `{spec['operation']}`: {options}")
        lines.append("")
    training = summary["training"]
    if training:
        versions = ", ".join(f"{name} {number}" for name, number in summary["versions"].items())
        lines += [
            "## Training",
            "",
            f"- data: {training['data']}",
            f"- objective: {training['objective']}",
            f"- steps: {training['steps']} ({training['tokens']:,} tokens, windows of "
            f"{training['seq_len']})",
            f"- optimizer: {training['optimizer']}, learning rate {training['lr']:g}",
            f"- seed: {summary['seed']}",
            f"- Python {summary['machine']['python']}, {versions}",
            "",
        ]
    measured = {moment: summary[moment] for moment in MOMENTS if summary[moment]}
    if measured:
        lines += [
            "## Held-out text",
            "",
            "| | loss (nats per token) | perplexity |",
            "| --- | --- | --- |",
        ]
        for moment, figures in measured.items():
            name = moment.replace("_", " ")
            lines.append(f"| {name} | {figures['loss']:.4f} | {figures['perplexity']:.3f} |")
        lines.append("")
    return "\n".join(lines)
