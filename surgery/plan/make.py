"""Making a plan: refuse what cannot be, resolve what can."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from surgery.anatomy import Anatomy, Site, find_sites
from surgery.errors import ConfigError
from surgery.plan.config_patch import apply_patch, head_count_patch
from surgery.plan.edits import SiteChange
from surgery.plan.operation import Operation, PlanContext
from surgery.plan.plan import Export, Plan
from surgery.plan.sizes import Sizes, attention_flops, kv_bytes_per_token

DEFAULT_INITIALIZER_RANGE = 0.02


def make_plan(
    model: PreTrainedModel,
    operations: Sequence[Operation],
    *,
    name: str = "",
    seed: int = 0,
    tokens: int = 512,
    kv_bytes: int = 2,
) -> Plan:
    """Resolve `operations` on `model`, which may live on the meta device.

    Args:
        model: the source; only its config and shapes are read.
        operations: in the order in which they are performed.
        name: what to call the source.
        seed: for operations that draw.
        tokens: window length for `attention_flops`.
        kv_bytes: bytes per cached value.

    Raises:
        ConfigError: an operation that cannot be performed on this model.
    """
    anatomy = find_sites(model)
    if operations:
        _refuse_unreadable(anatomy)
    initializer_range = getattr(
        model.config.get_text_config(), "initializer_range", DEFAULT_INITIALIZER_RANGE
    )
    context = PlanContext(seed, initializer_range or DEFAULT_INITIALIZER_RANGE)
    sites = list(anatomy.sites)
    changes: list[SiteChange] = []
    for operation in operations:
        made = operation.changes(sites, context)
        for change in made:
            sites[change.before.layer] = change.after
        changes += made

    patch = head_count_patch(anatomy.sites, sites)
    parameters = sum(p.numel() for p in model.parameters())
    added = sum(edit.added_parameters for change in changes for edit in change.edits)
    return Plan(
        model={
            "name": name,
            "class": type(model).__name__,
            "model_type": str(model.config.model_type),
        },
        operations=tuple(operation.to_json() for operation in operations),
        changes=tuple(changes),
        before=anatomy.sites,
        after=tuple(sites),
        config_patch=patch,
        tokens=tokens,
        kv_bytes=kv_bytes,
        sizes_before=_sizes(parameters, anatomy.sites, tokens, kv_bytes),
        sizes_after=_sizes(parameters + added, sites, tokens, kv_bytes),
        export=_export(model, sites, patch),
    )


def _refuse_unreadable(anatomy: Anatomy) -> None:
    if anatomy.sites:
        return
    if anatomy.unreadable:
        block = anatomy.unreadable[0]
        problem = f"no attention of {anatomy.model_class} can be operated on: {block.reason}"
        raise ConfigError("attention", problem, given=f"{block.path} ({block.kind})")
    raise ConfigError("attention", f"{anatomy.model_class} has no attention to operate on")


def _sizes(parameters: int, sites: Sequence[Site], tokens: int, kv_bytes: int) -> Sizes:
    return Sizes(
        parameters, kv_bytes_per_token(sites, kv_bytes), attention_flops(sites, tokens)
    )


def _export(model: PreTrainedModel, after: Sequence[Site], patch: dict[str, Any]) -> Export:
    """Native, if a model built from the patched config alone has the result's very shapes."""
    config = copy.deepcopy(model.config)
    apply_patch(config, patch)
    with torch.device("meta"):
        rebuilt = find_sites(type(model)(config)).sites
    differing = [a for a, b in zip(after, rebuilt, strict=True) if a != b]
    if not differing:
        return Export("native", "the architecture's own config says the result", ("transformers",))
    counts = ", ".join(str(n) for n in sorted({site.kv_heads for site in after}))
    return Export(
        "none",
        f"{model.config.model_type} configs hold one KV head count for all layers; "
        f"the result has {counts}",
        (),
    )
