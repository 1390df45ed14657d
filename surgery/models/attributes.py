"""Attributes of modules that hold a shape or a head count."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from surgery.models.sites import Site, names

# Module path → attribute → value, plain JSON.
Attributes = dict[str, dict[str, Any]]
_ABSENT = object()


def set_attributes(model: nn.Module, attributes: Mapping[str, Mapping[str, Any]]) -> None:
    """Set module path → attribute → value; a list becomes a tuple if the old value was one."""
    for path, values in attributes.items():
        module = model.get_submodule(path)
        for name, value in values.items():
            was_tuple = isinstance(vars(module).get(name), tuple)
            setattr(module, name, tuple(value) if was_tuple else copy.deepcopy(value))


def merge_attributes(*several: Mapping[str, Mapping[str, Any]]) -> Attributes:
    """Merge mappings into one; of two values for an attribute, the later one stays."""
    merged: Attributes = {}
    for attributes in several:
        for path, values in attributes.items():
            merged.setdefault(path, {}).update(values)
    return merged


@contextmanager
def setting_attributes(
    model: nn.Module, attributes: Mapping[str, Mapping[str, Any]]
) -> Iterator[None]:
    """Set attributes inside the block, and restore them after it."""
    before = {
        path: {name: vars(model.get_submodule(path)).get(name, _ABSENT) for name in values}
        for path, values in attributes.items()
    }
    set_attributes(model, attributes)
    try:
        yield
    finally:
        for path, values in before.items():
            module = model.get_submodule(path)
            for name, value in values.items():
                if value is _ABSENT:
                    delattr(module, name)
                else:
                    setattr(module, name, value)


def guess_attributes(module: nn.Module, old: Site, new: Site) -> list[Attributes]:
    """Guess from the names of attributes what the module of `old` must hold to become `new`.

    This is for architectures whose config cannot describe the result, so that there is no
    reference model. Names do not tell whether a width means all heads or the model's own width,
    so there are several guesses; running the block shows which one is right.

    Returns:
        Guesses, the most likely first: module path → attribute → value.
    """
    counts: dict[str, Any] = {}
    widths: dict[str, Any] = {}
    old_width, new_width = old.q_heads * old.value_dim, new.q_heads * new.value_dim
    for name, value in vars(module).items():
        if name in names.Q_HEADS and value == old.q_heads:
            counts[name] = new.q_heads
        elif name in names.KV_HEADS and value == old.kv_heads:
            counts[name] = new.kv_heads
        elif name == names.GROUPS:
            counts[name] = new.group_size
        elif name in names.WIDTHS and value == old_width != new_width:
            widths[name] = new_width
    if new.group_size > 1 and names.GROUPS not in counts:
        counts[names.GROUPS] = new.group_size
    split = getattr(module, "split_size", None)
    old_kv = old.kv_heads * old.head_dim
    # The value of GPT-2, or the value that an earlier operation set.
    if new.packing is not None and split in (old_width, [old_width, old_kv, old_kv]):
        kv = new.kv_heads * new.head_dim
        counts["split_size"] = [new_width, kv, kv] if kv != new_width else new_width
        widths.pop("split_size", None)
    own = {
        name: width for name, width in widths.items() if name not in ("embed_dim", "hidden_size")
    }
    projections = _find_projection_sizes(old, new) | _find_norm_counts(module, old, new)
    guesses: list[Attributes] = []
    for own_values in (counts | own, counts, counts | widths):
        guess = {old.path: own_values, **projections} if own_values else dict(projections)
        if guess not in guesses:
            guesses.append(guess)
    return guesses


def _find_norm_counts(module: nn.Module, old: Site, new: Site) -> Attributes:
    """Find head counts that a list of norms, one for each head, holds beside them."""
    found: Attributes = {}
    for norm, role in ((old.q_norm, "query"), (old.k_norm, "key")):
        before, after = old.count_heads(role), new.count_heads(role)
        if norm is None or not norm.each or before == after:
            continue
        held = vars(module.get_submodule(norm.path[len(old.path) + 1 :]))
        values = {name: after for name in names.Q_HEADS if held.get(name) == before}
        found |= {norm.path: values} if values else {}
    return found


def _find_projection_sizes(old: Site, new: Site) -> dict[str, dict[str, Any]]:
    sizes: Attributes = {}
    for role in ("query", "key", "value", "output"):
        before, after = old.get_projection(role), new.get_projection(role)
        into, out = ("nx", "nf") if before.transposed else ("in_features", "out_features")
        values = {}
        if before.in_features != after.in_features:
            values[into] = after.in_features
        if before.out_features != after.out_features:
            values[out] = after.out_features
        if values:
            sizes[before.path] = values
    return sizes
