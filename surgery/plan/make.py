"""Making a plan: refuse what cannot be, resolve what can."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from surgery.anatomy import Anatomy, Site, find_sites, text_config
from surgery.architecture.config_patch import head_count_patch
from surgery.architecture.twins import Twins
from surgery.errors import ConfigError
from surgery.models.own_record import is_own_record
from surgery.models.skeleton import skeleton_of
from surgery.plan.digest import digest
from surgery.plan.edits import SiteChange
from surgery.plan.export import config_says, export_of
from surgery.plan.operation import Draft, Operation, PlanContext, Step
from surgery.plan.plan import Plan
from surgery.plan.resolution import Resolution
from surgery.plan.sizes import Sizes, attention_flops, kv_bytes_per_token
from surgery.plan.structure import planned_shapes, resolve_structure
from surgery.rehouse import rehouse

DEFAULT_INITIALIZER_RANGE = 0.02


def make_plan(
    model: PreTrainedModel,
    operations: Sequence[Operation],
    *,
    name: str = "",
    seed: int = 0,
    tokens: int = 512,
    kv_bytes: int = 2,
    device: str = "cpu",
    native: bool = False,
    resolutions: Mapping[int, Resolution] | None = None,
    calibration: Mapping[str, Any] | None = None,
) -> Plan:
    """Resolve `operations` on `model`, which may live on the meta device.

    Args:
        model: the source; only its config and shapes are read.
        operations: in the order in which they are performed.
        name: what to call the source.
        seed: for operations that draw.
        tokens: window length for `attention_flops`.
        kv_bytes: bytes per cached value.
        device: where the result will run.
        native: whether to refuse a result that the architecture's own config cannot say.
        resolutions: what calibration decided, by the operation's place from 0.
        calibration: what it saw, for the plan's reader.

    Raises:
        ConfigError: an operation that cannot be performed on this model.
    """
    source = model
    source_sites = find_sites(source).sites
    parameters = sum(p.numel() for p in source.parameters())
    rehousing = operations[0].rehousing(model.config) if operations else None
    if rehousing is not None:
        model = rehouse(skeleton_of(source), **rehousing)
    anatomy = find_sites(model)
    if operations:
        _refuse_fused(model, anatomy)
        _refuse_quantized(model)
        _refuse_unreadable(anatomy)
    context = PlanContext(seed, _initializer_range(model), device, native)
    draft = _drafted(model, anatomy, operations, context, resolutions or {})
    before, after = anatomy.sites, tuple(draft.sites)
    twins = Twins(model)
    structure = resolve_structure(model, before, after, draft.changes, twins)
    steps = list(draft.steps)
    if structure.shares_kv:
        steps.append(Step("gqa", "share_kv", recorded=True))  # last: it follows the backend
    heads = head_count_patch(model.config, before, after)
    patch = None if heads is None else heads | draft.patch
    shapes = planned_shapes(model, structure.changes)
    export = export_of(
        after,
        shapes,
        patch,
        structure.attributes,
        steps,
        twins,
        None if rehousing is None else str(rehousing["into"]),
    )
    if native and export.format == "record":
        raise ConfigError(
            "export.format",
            f"the result cannot be native: {export.reason.split(';')[0]}",
            given="native",
            valid="auto, or operations that a config can say",
        )
    left = tuple(site for site in after if site.path not in draft.removed)
    return Plan(
        model={
            "name": name,
            "class": type(source).__name__,
            "model_type": str(source.config.model_type),
        },
        operations=tuple(operation.to_json() for operation in operations),
        rehousing=rehousing,
        changes=structure.changes,
        source=source_sites,
        before=before,
        after=left,
        left_alone=anatomy.left_alone,
        attributes=structure.attributes,
        config_patch=patch if patch and config_says(shapes, patch, twins) else draft.patch,
        steps=tuple(steps),
        notes=tuple(draft.notes),
        open_decisions=tuple(draft.open_decisions),
        calibration=calibration,
        resolved={name: digest(tensor) for name, tensor in draft.tensors.items()},
        tensors=draft.tensors,
        resolutions=dict(resolutions or {}),
        tokens=tokens,
        kv_bytes=kv_bytes,
        sizes_before=_sizes(parameters, source_sites, tokens, kv_bytes),
        sizes_after=_sizes(
            _parameters(model) + _added(model, structure.changes) - _removed(model, draft),
            left,
            tokens,
            kv_bytes,
        ),
        export=export,
    )


def _drafted(
    model: PreTrainedModel,
    anatomy: Anatomy,
    operations: Sequence[Operation],
    context: PlanContext,
    resolutions: Mapping[int, Resolution],
) -> Draft:
    draft = Draft(
        sites=list(anatomy.sites),
        config=copy.deepcopy(model.config),
        skeleton=model,
        context=context,
    )
    for number, operation in enumerate(operations):
        if number > 0 and operation.rehousing(model.config) is not None:
            raise ConfigError(
                f"attention.{operation.name}",
                "must come first: the other operations are planned on the architecture it leads to",
                given=", ".join(o.name for o in operations),
                valid=_reordered(operations, operation),
            )
        draft.number, draft.resolution = number, resolutions.get(number)
        operation.plan(draft)
    return draft


def _initializer_range(model: PreTrainedModel) -> float:
    found = getattr(text_config(model.config), "initializer_range", None)
    return found or DEFAULT_INITIALIZER_RANGE


def _reordered(operations: Sequence[Operation], late: Operation) -> str:
    """What the order would have to be; only one operation can move the model."""
    movers = [o.name for o in operations if type(o).rehousing is not Operation.rehousing]
    if len(movers) > 1:
        return f"only one of {' and '.join(movers)}"
    return ", ".join([late.name, *(o.name for o in operations if o is not late)])


def _refuse_fused(model: PreTrainedModel, anatomy: Anatomy) -> None:
    for site in anatomy.sites:
        if not isinstance(model.get_submodule(site.query.path).weight, nn.Parameter):
            raise ConfigError(
                "attention",
                "the projections are fused for the run, and edits need them apart",
                given=site.path,
                valid="surgery.unfuse_qkv_(model) first",
            )


def _refuse_quantized(model: PreTrainedModel) -> None:
    stored = getattr(model.config, "quantization_config", None)
    if stored is not None and not is_own_record(stored):
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
            "attention",
            f"no attention was recognised in {anatomy.model_class}{others}",
            given=anatomy.model_class,
            valid="a model with attention blocks, or attention=[]",
        )


def _sizes(parameters: int, sites: Sequence[Site], tokens: int, kv_bytes: int) -> Sizes:
    return Sizes(parameters, kv_bytes_per_token(sites, kv_bytes), attention_flops(sites, tokens))


def _parameters(model: PreTrainedModel) -> int:
    return sum(p.numel() for p in model.parameters())


def _added(model: PreTrainedModel, changes: Sequence[SiteChange]) -> int:
    """Parameters that edits add (or, below zero, take away), shared ones counted once."""
    owner = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    sizes: dict[int, list[int]] = {}  # of each parameter: before, after
    for change in changes:
        for edit in change.edits:
            for old, new in zip(edit.sources, edit.results, strict=True):
                first, _ = sizes.setdefault(owner[old.name], [old.numel, 0])
                sizes[owner[old.name]] = [first, new.numel]
    return sum(after - before for before, after in sizes.values())


def _removed(model: PreTrainedModel, draft: Draft) -> int:
    """Parameters of attention that goes altogether; its output bias stays."""
    count = 0
    for site in draft.sites:
        if site.path in draft.removed:
            count += sum(p.numel() for p in model.get_submodule(site.path).parameters())
            count -= site.hidden_size * site.output.bias
    return count
