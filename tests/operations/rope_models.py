"""Performing the operation `rope` on small models, without the rest of a plan."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from surgery.plan.steps import run_step
from torch import nn
from transformers import PreTrainedModel

from surgery.execute import rotary as _rebuild  # noqa: F401  fills the registry of steps
from surgery.models.config import apply_patch
from surgery.models.sites import find_sites
from surgery.plan.operation import Draft, PlanContext
from surgery.plan.registry import parse_operations
from tests.families import skeleton


def draft_of(model: PreTrainedModel, **options: Any) -> Draft:
    """The plan of `rope` with these options."""
    sites = list(find_sites(model).sites)
    draft = Draft(
        sites=sites,
        config=copy.deepcopy(model.config),
        context=PlanContext(seed=0, initializer_range=0.02),
        skeleton=skeleton(model),
    )
    (operation,) = parse_operations({"rope": options})
    operation.plan(draft)
    return draft


def perform(model: PreTrainedModel, draft: Draft) -> PreTrainedModel:
    apply_patch(model.config, copy.deepcopy(draft.patch))
    for step in draft.steps:
        run_step(step.kind, model, step.arguments)
    return model


def rope_(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    return perform(model, draft_of(model, **options))


def built_from(
    model: PreTrainedModel, patch: Mapping[str, Any], dtype: torch.dtype = torch.float64
) -> PreTrainedModel:
    """A fresh model of the patched config, with the weights of `model`."""
    config = copy.deepcopy(model.config)
    apply_patch(config, copy.deepcopy(dict(patch)))
    fresh = type(model)(config).to(dtype).eval()
    fresh.load_state_dict(model.state_dict())
    return fresh


@contextmanager
def without_rotation(model: PreTrainedModel, layers: Sequence[int] | None = None) -> Iterator[None]:
    """Every rotation handed to these sites is one by nothing: a reference made by hand."""

    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        cos, sin = kwargs["position_embeddings"]
        assert not args or args[0].ndim == 3  # hidden states at most
        return args, kwargs | {"position_embeddings": (cos * 0 + 1, sin * 0)}

    sites = [s for s in find_sites(model).sites if layers is None or s.layer in layers]
    handles = [
        model.get_submodule(site.path).register_forward_pre_hook(hook, with_kwargs=True)
        for site in sites
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
