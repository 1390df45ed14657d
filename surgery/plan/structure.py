"""What follows from changed heads: other tensors with a share per head, and attributes.

Where the architecture's config can say a site's new head counts, a twin built from it is asked.
Where it cannot, names are read, and the block is run on the meta device to see which reading it
takes; if none, the operation is refused with what the forward raised.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from surgery.anatomy import Site, names
from surgery.architecture.attributes import named_attributes
from surgery.architecture.twins import (
    Shapes,
    Twins,
    ancestors,
    differing_attributes,
    plain,
    shapes_of,
)
from surgery.errors import ConfigError
from surgery.models.own_record import recorded_attributes
from surgery.models.share_kv import has_own_eager
from surgery.plan.dependents import with_dependents
from surgery.plan.edits import SiteChange
from surgery.plan.trial import Attributes, said, taken, tried, whole_fault

__all__ = ["Attributes", "Structure", "planned_shapes", "resolve_structure"]


@dataclass(frozen=True)
class Structure:
    """What the changes of a plan need besides.

    Attributes:
        changes: with the edits of every tensor that has a share per head.
        attributes: module path → attribute → value.
        shares_kv: whether some block must be given eager attention with shared KV heads.
    """

    changes: tuple[SiteChange, ...]
    attributes: Attributes
    shares_kv: bool


def resolve_structure(
    model: PreTrainedModel,
    before: Sequence[Site],
    after: Sequence[Site],
    changes: Sequence[SiteChange],
    twins: Twins,
) -> Structure:
    """See the module's docstring.

    Raises:
        ConfigError: a forward that cannot take the new heads, or that holds in one place what
            would have to differ between sites.
    """
    changed = [(o, n) for o, n in zip(before, after, strict=True) if o != n]
    if not changed:
        return Structure(tuple(changes), {}, False)
    _refuse_joined(model, changes)
    _refuse_undescribed(changed, twins)
    site_twins = {old.path: twins.of_site(old, new) for old, new in changed}
    changes = with_dependents(model, changes, site_twins)
    attributes = _from_twins(before, after, site_twins, twins, recorded_attributes(model.config))
    unsaid = [(old, new) for old, new in changed if site_twins[old.path] is None]
    shares = _must_share(model, unsaid)
    options = {
        old.path: [attributes]
        if site_twins[old.path] is not None
        else named_attributes(model.get_submodule(old.path), old, new)
        for old, new in changed
    }
    patch = said(model, before, after, twins)
    if not unsaid and not whole_fault(model, changes, attributes, patch, mask=True):
        # Nothing to choose, and every block runs where the whole model does.
        return Structure(tuple(changes), attributes, shares)
    faults, mask = tried(model, [old for old, _ in changed], changes, options, patch)
    for old, new in changed:
        attributes |= taken(old, new, options[old.path], faults.get(old.path, {}))
    fault = "" if mask is None else whole_fault(model, changes, attributes, patch, mask)
    if fault:
        raise ConfigError(
            "attention", f"{type(model).__name__} does not run with these heads: {fault}"
        )
    return Structure(tuple(changes), attributes, shares)


def planned_shapes(model: PreTrainedModel, changes: Sequence[SiteChange]) -> Shapes:
    """Every tensor of the result."""
    shapes = shapes_of(model)
    for change in changes:
        for edit in change.edits:
            shapes |= {spec.name: spec.shape for spec in edit.results}
    return shapes


def _from_twins(
    before: Sequence[Site],
    after: Sequence[Site],
    site_twins: Mapping[str, PreTrainedModel | None],
    twins: Twins,
    recorded: Attributes,
) -> Attributes:
    found: Attributes = {}
    if not any(twin is not None for twin in site_twins.values()):
        return found
    original = twins.of({})
    for old, new in zip(before, after, strict=True):
        twin = site_twins.get(old.path) if old != new else original
        if twin is None:
            continue
        try:
            site = twin.get_submodule(new.block)
            around = {path: twin.get_submodule(path) for path in ancestors(new.block)}
            pairs = [
                (path, original.get_submodule(path), module)
                for path, module in (around | dict(site.named_modules(prefix=new.block))).items()
            ]
        except AttributeError:
            raise _undescribed(new) from None
        for path, theirs, ours in pairs:
            values = differing_attributes(theirs, ours)
            # What an earlier operation set stays; at a changed site it may have to be set back.
            for name, value in recorded.get(path, {}).items():
                if old == new:
                    values[name] = value
                elif name in vars(ours):
                    values[name] = plain(vars(ours)[name])
            if found.setdefault(path, values) != values:
                raise ConfigError(
                    "attention",
                    f"{path or type(twin).__name__} holds {', '.join(found[path] | values)} for "
                    "several attention blocks, so they cannot differ",
                )
    return {path: values for path, values in found.items() if values}


def _refuse_joined(model: PreTrainedModel, changes: Sequence[SiteChange]) -> None:
    """transformers joins some tensors when it saves, and cuts them into equal parts to load."""
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


def _refuse_undescribed(changed: Sequence[tuple[Site, Site]], twins: Twins) -> None:
    """Neither a config nor a record could say a block that the config does not build."""
    original = twins.of({})
    for old, _ in changed:
        try:
            original.get_submodule(old.path)
        except AttributeError:
            raise _undescribed(old) from None


def _undescribed(site: Site) -> ConfigError:
    return ConfigError("attention", f"the model has {site.path}, and its config describes none")


def _must_share(model: PreTrainedModel, unsaid: Sequence[tuple[Site, Site]]) -> bool:
    sharing = False
    for old, new in unsaid:
        if new.group_size == 1 or old.group_size == new.group_size:
            continue
        module = model.get_submodule(old.path)
        if names.GROUPS in vars(module):
            continue
        if not has_own_eager(module):
            if new.kv_heads == 1:  # products broadcast one head by themselves
                continue
            raise ConfigError(
                "attention.gqa",
                f"the forward of {old.path} cannot share KV heads between query heads: "
                f"{type(module).__name__} attends in its own way",
                given=f"{new.kv_heads} KV heads",
                valid=f"{new.q_heads}: one for each query head",
            )
        sharing = True
    return sharing
