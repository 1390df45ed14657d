"""Operations planned without the rest of a plan, and a plain run of what they planned."""

from __future__ import annotations

from transformers import PreTrainedModel

from surgery.execute.config import patch_config_
from surgery.models.attributes import set_attributes
from surgery.models.sites import find_sites
from surgery.plan.draft import Draft, PlanContext
from surgery.plan.make import _draft_plan
from surgery.plan.operation import Operation
from surgery.plan.registry import run_step


def drafted(model: PreTrainedModel, *operations: Operation, device: str = "cpu") -> Draft:
    """What `operations` add to a plan for `model`."""
    context = PlanContext(seed=0, initializer_range=0.02, device=device)
    return _draft_plan(model, find_sites(model), operations, context, {})


def performed(model: PreTrainedModel, draft: Draft) -> PreTrainedModel:
    """All of `draft` but its tensor edits, done to `model`."""
    set_attributes(model, draft.find_attributes())
    patch_config_(model, draft.patch)
    for step in draft.steps:
        run_step(step.kind, model, step.arguments)
    return model
