"""Tensors of a block that have a share per head besides its projections: sinks, gates, biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from surgery.errors import ConfigError
from surgery.models.reference import Shapes, find_first_difference, get_shapes
from surgery.models.sites import Site
from surgery.transforms.edits import SiteChange, TensorEdit
from surgery.transforms.head_edits import make_dependent_edit


def add_dependents(
    model: PreTrainedModel,
    changes: Sequence[SiteChange],
    references: Mapping[str, PreTrainedModel | None],
) -> list[SiteChange]:
    """Add to each change the edits of its site's other tensors that have a part per head.

    Raises:
        ConfigError: a tensor depends on the head counts in an unknown way.
    """
    shapes = get_shapes(model)
    found = []
    for change in changes:
        site = change.before
        reference = references.get(site.path)
        wanted = (
            get_shapes(reference.get_submodule(site.block), f"{site.block}.") if reference else None
        )
        operation = change.edits[0].operation if change.edits else ""
        extra: list[TensorEdit] = []
        for name, shape in _find_other_tensors(site, shapes).items():
            for axis, role in _find_head_axes(name, shape, change, wanted):
                extra.append(make_dependent_edit(change, operation, name, shape, axis, role))
                shape = extra[-1].results[0].shape
        change = replace(change, edits=(*change.edits, *extra))
        for edit in change.edits:
            shapes |= {spec.name: spec.shape for spec in edit.results}
            for name in edit.dropped:
                del shapes[name]
        found.append(change)
    last = {change.before.path: change for change in found}
    for path, change in last.items():
        reference = references.get(path)
        if reference is not None:
            _check_site(change.after, shapes, reference)
    return found


def _find_other_tensors(site: Site, shapes: Shapes) -> Shapes:
    """Find the tensors of the site's block other than its projections and norms."""
    known = [site.query, site.key, site.value, site.output, site.q_norm, site.k_norm]
    own = tuple(f"{part.path}." for part in known if part is not None)
    return {
        name: shape
        for name, shape in shapes.items()
        if name.startswith(f"{site.block}.") and not name.startswith(own)
    }


def _find_head_axes(
    name: str, shape: tuple[int, ...], change: SiteChange, wanted: Shapes | None
) -> list[tuple[int, str]]:
    """Find the axes along which a tensor has a part per head, and the role of these heads."""
    old, new = change.before, change.after
    counts = [("query", old.q_heads, new.q_heads), ("key", old.kv_heads, new.kv_heads)]
    merges = any(len(part) > 1 for part in change.kv)
    found = []
    for axis, size in enumerate(shape):
        for role, before, after in counts:
            if before == after or (role == "key" and merges):
                continue
            if wanted is None:
                follows = size == before and role == "query"
            else:
                built = wanted.get(name, ())
                follows = (
                    len(built) == len(shape)
                    and built[axis] != size
                    and size % before == 0
                    and built[axis] == size // before * after
                )
            if follows:
                found.append((axis, role))
                break
    return found


def _check_site(site: Site, shapes: Shapes, reference: PreTrainedModel) -> None:
    built = get_shapes(reference.get_submodule(site.block), f"{site.block}.")
    planned = {n: shape for n, shape in shapes.items() if n.startswith(f"{site.block}.")}
    name = find_first_difference(planned, built)
    if name is not None:
        raise ConfigError(
            "attention",
            f"{type(reference.get_submodule(site.path)).__name__} holds {name}, which follows its "
            f"heads in a way that is not understood: it would be {built.get(name, 'absent')}, "
            f"and is planned as {planned.get(name, 'absent')}",
        )
