"""Make a plan: refuse what cannot be done, and resolve the rest."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence, Sized
from dataclasses import asdict, replace
from typing import Any

from transformers import PreTrainedModel

from surgery.config.options import check_ranges
from surgery.errors import ConfigError, ConversionError
from surgery.models.attributes import merge_attributes
from surgery.models.config import make_head_count_patch
from surgery.models.convert import convert_model
from surgery.models.copies import make_meta_copy
from surgery.models.editable import check_editable, check_model
from surgery.models.reference import ReferenceModels
from surgery.models.share_kv import has_own_eager
from surgery.models.sites import Anatomy, Site, find_sites, get_text_config, names
from surgery.plan.digest import hash_tensor
from surgery.plan.draft import Draft, PlanContext, Step
from surgery.plan.export import can_config_say, decide_export
from surgery.plan.operation import SHARE_KV, Conversion, Operation, Outcome, Position
from surgery.plan.plan import Plan
from surgery.plan.resolution import Resolution
from surgery.plan.sizes import count_sizes
from surgery.plan.structure import plan_shapes, resolve_structure
from surgery.transforms.edits import SiteChange
from surgery.verify.cache import list_cached_heads

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
    """Plan `operations` on `model`, which may be on the meta device.

    Args:
        model: the source; only its config and shapes are read.
        operations: in the order in which they are performed.
        name: name of the source, for people.
        seed: for operations that draw.
        tokens: length at which the sizes are given.
        kv_bytes: bytes per cached value.
        device: where the result will run.
        native: whether to refuse a result that the architecture's own config cannot say.
        resolutions: what calibration decided, by the operation's place from 0.
        calibration: what it measured, for people who read the plan.

    Raises:
        ConfigError: an operation that cannot be performed on this model.
    """
    check_order(operations)
    check_model(model)
    conversion = operations[0].choose_conversion(model) if operations else None
    if operations:
        check_editable(model, converts=conversion is not None)
    source = model
    source_sites = find_sites(source).sites
    parameters = _count_parameters(source)
    if conversion is not None:
        model = _convert_source(operations[0], make_meta_copy(source), conversion)
    anatomy = find_sites(model)
    if operations:
        _refuse_unreadable(anatomy)
    context = PlanContext(seed, _get_initializer_range(model), device, native, tokens, kv_bytes)
    draft = _draft_plan(
        model, anatomy, operations, context, resolutions or {}, converted=conversion is not None
    )
    before, after = anatomy.sites, tuple(draft.sites)
    references = draft.references
    structure = resolve_structure(model, before, after, draft.changes, references)
    steps = list(draft.steps)
    if structure.shares_kv:  # last: it depends on the backend
        steps.append(Step(structure.shares_kv, SHARE_KV, recorded=True))
    after = _set_windows(after, draft)
    heads = make_head_count_patch(model.config, before, after)
    patch = None if heads is None else heads | draft.patch
    shapes = plan_shapes(model, structure.changes)
    head_patch = {}
    if heads and can_config_say(shapes, heads | draft.patch, references):
        head_patch = heads
    if operations:
        _add_cache_note(draft, after, references.get({**head_patch, **draft.patch}))
    attributes = draft.find_attributes()
    export = decide_export(
        after,
        shapes,
        patch,
        merge_attributes(attributes, structure.attributes),
        steps,
        references,
        None if conversion is None else conversion.into,
    )
    if native and export.format == "record":
        raise ConfigError(
            "export.format",
            f"the result cannot be native: {export.reason.split(';')[0]}",
            given="native",
            valid="auto, or operations that a config can say",
        )
    left = tuple(site for site in after if site.path not in draft.removed)
    changed = parameters if conversion is None else _count_parameters(model)
    changed += _count_added(model, structure.changes) - _count_removed(model, draft)
    sizes = count_sizes(changed, left, tokens, kv_bytes)
    for operation in operations:
        sizes = operation.adjust_sizes(sizes, tokens)
    return Plan(
        model={
            "name": name,
            "class": type(source).__name__,
            "model_type": str(source.config.model_type),
        },
        operations=tuple(operation.to_json() for operation in operations),
        outcomes=_describe_outcomes(operations, structure.changes, steps, draft, conversion),
        conversion=None if conversion is None else asdict(conversion),
        changes=structure.changes,
        source=source_sites,
        before=before,
        after=left,
        left_alone=anatomy.left_alone,
        layers=draft.layers,
        attributes=attributes,
        head_attributes=structure.attributes,
        config_patch=draft.patch,
        head_patch=head_patch,
        steps=tuple(steps),
        implementation=draft.implementation or None,
        notes=tuple(draft.notes),
        open_decisions=tuple(draft.open_decisions),
        calibration=calibration,
        resolved={name: hash_tensor(tensor) for name, tensor in draft.tensors.items()},
        tensors=draft.tensors,
        resolutions=dict(resolutions or {}),
        tokens=tokens,
        kv_bytes=kv_bytes,
        sizes_before=count_sizes(parameters, source_sites, tokens, kv_bytes),
        sizes_after=sizes,
        export=export,
    )


def _convert_source(
    operation: Operation, model: PreTrainedModel, conversion: Conversion
) -> PreTrainedModel:
    try:
        return convert_model(model, **asdict(conversion))
    except ConversionError as error:
        raise operation.explain_conversion_error(error) from None


def check_order(operations: Sequence[Operation]) -> None:
    """Check that the operations are in a valid order.

    Raises:
        ConfigError: they are not; the error names a valid order.
    """
    names = [operation.name for operation in operations]
    given = ", ".join(names)
    first = [o.name for o in operations if o.position is Position.FIRST]
    last = [o.name for o in operations if o.position is Position.LAST or o.deferred]
    for which, position in ((first, "first"), (last, "last")):
        if len(which) > 1:
            raise ConfigError(
                "attention",
                f"{' and '.join(which)} must both come {position}",
                given=given,
                valid=f"only one of {' and '.join(which)}",
            )
    valid = [*first, *(n for n in names if n not in (*first, *last)), *last]
    if valid != names:
        moved = first[0] if first and names[0] != first[0] else last[0]
        deferred = [operation.name for operation in operations if operation.deferred]
        why = (
            "must come first: the other operations are planned on its result"
            if moved in first
            else "must come last: it is performed after training"
            if moved in deferred
            else "must come last"
        )
        raise ConfigError(f"attention.{moved}", why, given=given, valid=", ".join(valid))


def _draft_plan(
    model: PreTrainedModel,
    anatomy: Anatomy,
    operations: Sequence[Operation],
    context: PlanContext,
    resolutions: Mapping[int, Resolution],
    *,
    converted: bool = False,
) -> Draft:
    draft = Draft(
        sites=list(anatomy.sites),
        config=copy.deepcopy(model.config),
        model=model,
        references=ReferenceModels(model),
        context=context,
    )
    for number, operation in enumerate(operations):
        check_ranges(operation, f"attention.{operation.name}.")
        operation.check_options()
        draft.number, draft.name = number, operation.name
        draft.resolution = resolutions.get(number)
        before = _collect_effects(draft)
        operation.plan(draft)
        if _collect_effects(draft) == before and not (converted and not number):
            draft.notes.append(f"{operation.name}: changes nothing, the model is so already")
    return draft


def _collect_effects(draft: Draft) -> list[Any]:
    """Collect what a draft does, and says: an operation that adds nothing has no effect."""
    counted: tuple[Sized, ...] = (
        draft.changes,
        draft.steps,
        draft.notes,
        draft.open_decisions,
        draft.removed,
    )
    own = copy.deepcopy(draft.attributes_by)
    return [*map(len, counted), draft.config.to_dict(), own, draft.implementation]


def _add_cache_note(draft: Draft, sites: Sequence[Site], reference: PreTrainedModel) -> None:
    """Say where an architecture's own cache keeps more heads than the planned sizes count."""
    shared = [site for site in sites if site.cached and site.group_size > 1]
    # Code that is told of groups, or calls attention through transformers, repeats them afterwards.
    own = [
        site
        for site in shared
        if names.GROUPS not in vars(module := draft.model.get_submodule(site.path))
        and not has_own_eager(module)
    ]
    described = {site.path: site.kv_heads for site in find_sites(reference).sites} if own else {}
    own = [site for site in own if described.get(site.path) == site.kv_heads]
    if not own:
        return
    held = max(list_cached_heads(reference), default=0)
    kept = max(site.kv_heads for site in own)
    if held > kept:
        draft.notes.append(
            f"KV cache: {type(reference).__name__} itself keeps {held} heads per layer, one for "
            f"each query head; the sizes are those of software that keeps {kept}"
        )


def _set_windows(sites: Sequence[Site], draft: Draft) -> tuple[Site, ...]:
    """Give the sites the windows that follow from the patched config."""
    if not draft.patch:
        return tuple(sites)
    found = find_sites(draft.references.get(draft.patch)).sites
    windows = {site.path: site.window for site in found}
    return tuple(replace(site, window=windows.get(site.path, site.window)) for site in sites)


def _describe_outcomes(
    operations: Sequence[Operation],
    changes: Sequence[SiteChange],
    steps: Sequence[Step],
    draft: Draft,
    conversion: Conversion | None,
) -> tuple[str, ...]:
    edits = [edit for change in changes for edit in change.edits]
    return tuple(
        operation.describe(
            Outcome(
                tensors=sum(edit.operation == operation.name for edit in edits),
                config=draft.set_by.get(number, {}),
                attributes=len(draft.attributes_by.get(number, ())),
                steps=[step.kind for step in steps if step.operation == operation.name],
                into=conversion.into if conversion is not None and not number else None,
            )
        )
        for number, operation in enumerate(operations)
    )


def _get_initializer_range(model: PreTrainedModel) -> float:
    found = getattr(get_text_config(model.config), "initializer_range", None)
    return found or DEFAULT_INITIALIZER_RANGE


def _refuse_unreadable(anatomy: Anatomy) -> None:
    """Refuse a model with attention that cannot be read, or without attention."""
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


def _count_parameters(model: PreTrainedModel) -> int:
    return sum(p.numel() for p in model.parameters())


def _count_added(model: PreTrainedModel, changes: Sequence[SiteChange]) -> int:
    """Count the parameters that edits add (negative: remove); shared ones count once."""
    owner: dict[str, Any] = {
        name: id(p) for name, p in model.named_parameters(remove_duplicate=False)
    }
    sizes: dict[Any, list[int]] = {}  # of each parameter: before, after
    for edit in (edit for change in changes for edit in change.edits):
        results = {spec.name: spec.numel for spec in edit.results}
        for old in edit.sources:
            size = sizes.setdefault(owner.get(old.name, old.name), [old.numel, 0])
            size[1] = results.pop(old.name, 0)
        for name, numel in results.items():  # a head's own norm, where heads are repeated
            sizes.setdefault(owner.get(name, name), [0, 0])[1] = numel
    return sum(after - before for before, after in sizes.values())


def _count_removed(model: PreTrainedModel, draft: Draft) -> int:
    """Count the parameters of attention that is removed completely; its output bias stays."""
    count = 0
    for site in draft.sites:
        if site.path in draft.removed:
            count += sum(p.numel() for p in model.get_submodule(site.path).parameters())
            count -= site.hidden_size * site.output.bias
    return count
