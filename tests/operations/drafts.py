"""A draft without the rest of planning, and a plain run of the steps it holds."""

from __future__ import annotations

import copy

import surgery.execute.dropout  # noqa: F401  (fills the registry of steps)
from surgery.plan.steps import run_step
from transformers import PreTrainedModel

from surgery.models.config import apply_patch
from surgery.models.sites import find_sites
from surgery.plan.operation import Draft, Operation, PlanContext


def drafted(model: PreTrainedModel, *operations: Operation, device: str = "cpu") -> Draft:
    """What `operations` add to a plan for `model`."""
    draft = Draft(
        sites=list(find_sites(model).sites),
        config=copy.deepcopy(model.config),
        context=PlanContext(seed=0, initializer_range=0.02, device=device),
        skeleton=model,
    )
    for operation in operations:
        operation.plan(draft)
    return draft


def performed(model: PreTrainedModel, draft: Draft) -> PreTrainedModel:
    """The config patch and the steps of `draft`, done to `model`."""
    apply_patch(model.config, draft.patch)
    for step in draft.steps:
        run_step(step.kind, model, step.arguments)
    return model
