"""A plan performed on a file of weights, edit after edit, with no model around."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from surgery.plan.plan import Plan
from surgery.transforms import run_transform


def performed(plan: Plan, weights: Path) -> dict[str, torch.Tensor]:
    """Name → tensor, for whatever the plan's edits make."""
    made: dict[str, torch.Tensor] = {}
    with safe_open(weights, "pt") as file:
        for edit in plan.edits:
            sources = [
                made[spec.name] if spec.name in made else file.get_tensor(spec.name)
                for spec in edit.sources
            ]
            results = run_transform(
                edit.transform, [*sources, *plan.get_inputs(edit)], edit.arguments
            )
            made |= {spec.name: tensor for spec, tensor in zip(edit.results, results, strict=True)}
    return made
