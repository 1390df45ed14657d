"""Making a plan: refuse what cannot be, resolve what can."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from surgery.anatomy import Anatomy, Site, find_sites, text_config
from surgery.errors import ConfigError
from surgery.plan.config_patch import head_count_patch
from surgery.plan.edits import SiteChange
from surgery.plan.operation import Operation, PlanContext
from surgery.plan.plan import Plan
from surgery.plan.sizes import Sizes, attention_flops, kv_bytes_per_token
from surgery.plan.twins import Twins, changed_attributes, export_of, planned_shapes

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
        _refuse_quantized(model)
        _refuse_unreadable(anatomy)
    initializer_range = getattr(text_config(model.config), "initializer_range", None)
    context = PlanContext(seed, initializer_range or DEFAULT_INITIALIZER_RANGE)
    sites = list(anatomy.sites)
    changes: list[SiteChange] = []
    for operation in operations:
        made = operation.changes(sites, context)
        for change in made:
            sites[change.before.layer] = change.after
        changes += made

    patch = head_count_patch(anatomy.sites, sites)
    twins = Twins(model)
    shapes = planned_shapes(model, changes)
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
        left_alone=anatomy.left_alone,
        attributes=changed_attributes(anatomy.sites, sites, shapes, twins),
        config_patch=patch,
        tokens=tokens,
        kv_bytes=kv_bytes,
        sizes_before=_sizes(parameters, anatomy.sites, tokens, kv_bytes),
        sizes_after=_sizes(parameters + added, sites, tokens, kv_bytes),
        export=export_of(sites, shapes, patch, twins),
    )


def _refuse_quantized(model: PreTrainedModel) -> None:
    stored = getattr(model.config, "quantization_config", None)
    if stored is not None:
        method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
        raise ConfigError(
            "attention",
            "quantized weights cannot be operated on",
            given=str(getattr(method, "value", method)),
            valid="the model's unquantized original",
        )


def _refuse_unreadable(anatomy: Anatomy) -> None:
    """A model is operated on where all its attention is understood, never in part."""
    if anatomy.unreadable:
        block, read = anatomy.unreadable[0], len(anatomy.sites)
        share = f"{len(anatomy.unreadable)} of {read + len(anatomy.unreadable)}" if read else "none"
        raise ConfigError(
            "attention",
            f"{share} of the attention blocks of {anatomy.model_class} "
            f"can{'not' if read else ''} be operated on: {block.reason}",
            given=f"{block.path} ({block.kind})",
        )
    if not anatomy.sites:
        others = "".join(f"; {block.path}: {block.reason}" for block in anatomy.left_alone[:1])
        raise ConfigError(
            "attention", f"no attention was recognised in {anatomy.model_class}{others}"
        )


def _sizes(parameters: int, sites: Sequence[Site], tokens: int, kv_bytes: int) -> Sizes:
    return Sizes(parameters, kv_bytes_per_token(sites, kv_bytes), attention_flops(sites, tokens))
