"""Performing the operation `rope` on small models, without the rest of a plan."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from surgery.models.config import apply_patch
from surgery.models.sites import find_sites
from surgery.plan.draft import Draft
from surgery.plan.registry import parse_operations
from tests.families import skeleton
from tests.operations.drafts import drafted, performed

# Whose blocks are handed their rotations by one module of the model.
ROTARY_FAMILIES = [
    "llama",
    "cohere",
    "gemma2",
    "gemma3",
    "glm4",
    "gpt_oss",
    "granite",
    "mistral",
    "mixtral",
    "olmo2",
    "phi",
    "qwen3",
    "stablelm",
    "starcoder2",
]


def draft_of(model: PreTrainedModel, **options: Any) -> Draft:
    """The plan of `rope` with these options."""
    return drafted(skeleton(model), *parse_operations({"rope": options}))


def rope_(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    return performed(model, draft_of(model, **options))


def built_from(
    model: PreTrainedModel, patch: Mapping[str, Any], dtype: torch.dtype = torch.float64
) -> PreTrainedModel:
    """A fresh model of the patched config, with the weights of `model`."""
    config = copy.deepcopy(model.config)
    apply_patch(config, copy.deepcopy(dict(patch)))
    fresh = type(model)(config).to(dtype).eval()
    fresh.load_state_dict(model.state_dict())
    return fresh


@torch.no_grad()
def decoded(model: PreTrainedModel, ids: torch.Tensor, prefix: int) -> torch.Tensor:
    """Logits of `ids`, the last ones token by token with a cache."""
    first = model(input_ids=ids[:, :prefix], use_cache=True)
    parts, cache = [first.logits], first.past_key_values
    for i in range(prefix, ids.shape[1]):
        step = model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        parts.append(step.logits)
    return torch.cat(parts, dim=1)


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
