"""Find what follows from changed heads: edits of other tensors with a part per head, attributes.

If the architecture's config can describe a site's new head counts, a reference model is built from
it. If not, attributes are guessed by their names, and the block is run on the meta device to see
which guess works; if none does, the operation is refused with the error of the forward pass.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from surgery.errors import ConfigError
from surgery.models.attributes import Attributes, guess_attributes, to_plain
from surgery.models.own_record import read_recorded_attributes
from surgery.models.reference import (
    ReferenceModels,
    Shapes,
    find_differing_attributes,
    get_shapes,
    list_ancestors,
)
from surgery.models.share_kv import has_own_eager
from surgery.models.sites import Site, names
from surgery.plan.dependents import add_dependents
from surgery.transforms.edits import SiteChange
from surgery.verify.shapes import find_head_patch, find_whole_fault, pick_attributes, try_sites


@dataclass(frozen=True)
class Structure:
    """What the changes of a plan need in addition.

    Attributes:
        changes: with the edits of every tensor that has a part per head.
        attributes: module path → attribute → value.
        shares_kv: the operation after which some block needs eager attention with shared KV heads;
            "" if none does.
    """

    changes: tuple[SiteChange, ...]
    attributes: Attributes
    shares_kv: str


def resolve_structure(
    model: PreTrainedModel,
    before: Sequence[Site],
    after: Sequence[Site],
    changes: Sequence[SiteChange],
    references: ReferenceModels,
) -> Structure:
    """Resolve what follows from `changes`; see the module's docstring.

    Raises:
        ConfigError: the forward pass does not run with the new heads, or one module holds for all
            sites what would have to differ between them.
    """
    changed = [(o, n) for o, n in zip(before, after, strict=True) if o != n]
    if not changed:
        return Structure(tuple(changes), {}, "")
    _refuse_joined(model, changes)
    _refuse_undescribed(changed, references)
    of_sites = {old.path: references.get_for_site(old, new) for old, new in changed}
    changes = add_dependents(model, changes, of_sites)
    recorded = read_recorded_attributes(model.config)
    attributes = _find_attributes(before, after, of_sites, references, recorded)
    undescribed = [(old, new) for old, new in changed if of_sites[old.path] is None]
    shares = _find_sharing(model, undescribed, changes)
    options = {
        old.path: [attributes]
        if of_sites[old.path] is not None
        else guess_attributes(model.get_submodule(old.path), old, new)
        for old, new in changed
    }
    patch = find_head_patch(model, before, after, references)
    if not undescribed and not find_whole_fault(model, changes, attributes, patch, mask=True):
        # Nothing to choose, and if the whole model runs, every block does.
        return Structure(tuple(changes), attributes, shares)
    faults, mask = try_sites(model, [old for old, _ in changed], changes, options, patch)
    for old, new in changed:
        attributes |= pick_attributes(old, new, options[old.path], faults.get(old.path, {}))
    fault = "" if mask is None else find_whole_fault(model, changes, attributes, patch, mask)
    if fault:
        raise ConfigError(
            "attention", f"{type(model).__name__} does not run with these heads: {fault}"
        )
    return Structure(tuple(changes), attributes, shares)


def plan_shapes(model: PreTrainedModel, changes: Sequence[SiteChange]) -> Shapes:
    """Shapes of all tensors of the result, by name."""
    shapes = get_shapes(model)
    for change in changes:
        for edit in change.edits:
            shapes |= {spec.name: spec.shape for spec in edit.results}
            for name in edit.dropped:
                del shapes[name]
    return shapes


def _find_attributes(
    before: Sequence[Site],
    after: Sequence[Site],
    of_sites: Mapping[str, PreTrainedModel | None],
    references: ReferenceModels,
    recorded: Attributes,
) -> Attributes:
    found: Attributes = {}
    if not any(reference is not None for reference in of_sites.values()):
        return found
    original = references.get({})
    originals = dict(original.named_modules())
    for old, new in zip(before, after, strict=True):
        reference = of_sites.get(old.path) if old != new else original
        if reference is None:
            continue
        try:
            site = reference.get_submodule(new.block)
            around = {path: reference.get_submodule(path) for path in list_ancestors(new.block)}
        except AttributeError:
            raise _explain_undescribed(new) from None
        if new.block not in originals:
            raise _explain_undescribed(new)
        pairs = [
            (path, originals[path], module)
            for path, module in (around | dict(site.named_modules(prefix=new.block))).items()
            if path in originals  # a norm for one head more is a copy of the first
        ]
        for path, old_module, new_module in pairs:
            values = find_differing_attributes(old_module, new_module)
            # What an earlier operation set stays; a changed site may need its first value again.
            for name, value in recorded.get(path, {}).items():
                if old == new:
                    values[name] = value
                elif name in vars(new_module):
                    values[name] = to_plain(vars(new_module)[name])
                elif name == names.GROUPS and path == new.path:  # the class itself has none
                    values[name] = new.group_size
            if found.setdefault(path, values) != values:
                raise ConfigError(
                    "attention",
                    f"{path or type(reference).__name__} holds {', '.join(found[path] | values)} "
                    "for several attention blocks, so they cannot differ",
                )
    return {path: values for path, values in found.items() if values}


def _refuse_joined(model: PreTrainedModel, changes: Sequence[SiteChange]) -> None:
    """Refuse tensors that transformers joins on saving, and splits into equal parts on loading."""
    joined = [
        pattern
        for conversion in get_model_conversion_mapping(model, add_legacy=False)
        if isinstance(conversion, WeightConverter) and len(conversion.target_patterns) > 1
        for pattern in conversion.target_patterns
    ]
    edited = [spec.name for change in changes for edit in change.edits for spec in edit.results]
    name = next((n for n in edited for pattern in joined if re.search(pattern, n)), None)
    if name is not None:
        raise ConfigError(
            "attention",
            f"{model.config.model_type} checkpoints hold {name} joined with others, in equal "
            "parts: one of another size could not be loaded again",
        )


def _refuse_undescribed(changed: Sequence[tuple[Site, Site]], references: ReferenceModels) -> None:
    """Refuse blocks that the config does not build: no config or record could describe them."""
    original = references.get({})
    for old, _ in changed:
        try:
            original.get_submodule(old.path)
        except AttributeError:
            raise _explain_undescribed(old) from None


def _explain_undescribed(site: Site) -> ConfigError:
    return ConfigError(
        "attention", f"the model has {site.path}, but its config does not describe it"
    )


def _find_sharing(
    model: PreTrainedModel, undescribed: Sequence[tuple[Site, Site]], changes: Sequence[SiteChange]
) -> str:
    """Find the operation after which eager attention must share KV heads; "" if there is none."""
    sharing = ""
    for old, new in undescribed:
        if new.group_size == 1 or old.group_size == new.group_size:
            continue
        module = model.get_submodule(old.path)
        if names.GROUPS in vars(module):
            continue
        operation = next(
            edit.operation for c in changes if c.before.path == old.path for edit in c.edits
        )
        if not has_own_eager(module):
            if new.kv_heads == 1:  # products broadcast one head by themselves
                continue
            raise ConfigError(
                f"attention.{operation}",
                f"the forward of {old.path} cannot share KV heads between query heads: "
                f"{type(module).__name__} has its own attention code",
                given=f"{new.kv_heads} KV heads",
                valid=f"{new.q_heads}: one for each query head",
            )
        sharing = operation
    return sharing
