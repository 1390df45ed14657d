"""Attributes of modules that hold a shape or a head count."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from surgery.config.hints import shorten
from surgery.config.options import SHARE
from surgery.errors import PlanError
from surgery.models.rotary import find_rotaries
from surgery.models.sites import Site, find_sites, names

# Module path → attribute → value, plain JSON.
Attributes = dict[str, dict[str, Any]]
_ABSENT = object()
# Plain values of every block that say what it is, not how large.
_NEVER = {"training", "layer_idx"}
_MOST = 2**31 - 1


def set_attributes(model: nn.Module, attributes: Mapping[str, Mapping[str, Any]]) -> None:
    """Set module path → attribute → value; a list becomes a tuple if the old value was one."""
    for path, values in attributes.items():
        module = model.get_submodule(path)
        for name, value in values.items():
            was_tuple = isinstance(vars(module).get(name), tuple)
            setattr(module, name, tuple(value) if was_tuple else copy.deepcopy(value))


def check_attributes(
    model: PreTrainedModel,
    attributes: Mapping[str, Mapping[str, Any]],
    derived: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Check that these are attributes which plans set, before any of them is set.

    They are plain values that an attention block, a module in it or around it or a rotary module
    holds already, or that the config has a field for; and the new value is of the same kind and in
    its range. The whole model holds, besides its config's fields, only numbers. What a module holds
    already, and what follows from the patched config, may be set on any module.

    Args:
        derived: what follows from the config, in the form of `attributes`.

    Raises:
        PlanError: one is not; the module, the attribute and what is valid are named.
    """
    if not attributes:
        return
    modules = dict(model.named_modules())
    allowed = set(find_rotaries(model)) | _list_attention_paths(model, modules)
    for path, wanted in attributes.items():
        if path not in modules:
            raise PlanError(f"{path}: the model has no such module")
        known = {**_get_plain(modules[path]), **(derived or {}).get(path, {})}
        values = {
            name: value
            for name, value in wanted.items()
            if name not in known or type(known[name]) is not type(value) or known[name] != value
        }
        if values and path not in allowed:
            raise PlanError(
                f"{path or type(model).__name__}: is not an attention block, nor a part of one, "
                f"so {', '.join(values)} cannot be set on it"
            )
        for name, value in values.items():
            valid = _find_valid(model, modules[path], name, value)
            if not path and (type(value) is not int or _is_field(model, name)):
                valid = "no plan sets it on the whole model"
            if valid is not None:
                where = path or type(model).__name__
                raise PlanError(f"{where}.{name}: {valid}, not {shorten(value)}")


def _get_plain(module: nn.Module) -> dict[str, Any]:
    """Get the plain values that a module holds, as JSON holds them, and that plans may set."""
    return {n: to_plain(v) for n, v in vars(module).items() if _is_public(n) and is_plain(v)}


def _is_public(name: str) -> bool:
    """Whether plans may set an attribute of this name, where its value allows it."""
    return name.isidentifier() and not name.startswith("_") and name not in _NEVER


def _list_attention_paths(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> set[str]:
    """List the paths of the modules in attention blocks and around them, but the model's own."""
    anatomy = find_sites(model)
    blocks = {site.block for site in anatomy.sites} | {site.path for site in anatomy.sites}
    blocks |= {block.path for block in (*anatomy.unreadable, *anatomy.left_alone)}
    around = {path.rsplit(".", n)[0] for path in blocks for n in range(path.count(".") + 1)}
    starts = tuple(f"{path}." for path in blocks)
    return {p for p in modules if not p or p in around or p.startswith(starts)}


def _is_field(model: PreTrainedModel, name: str) -> bool:
    return hasattr(model.config.get_text_config(), name)


def _find_valid(model: PreTrainedModel, module: nn.Module, name: str, value: Any) -> str | None:
    """Find what an attribute must be instead; ``None`` if it can be set to this value."""
    held = vars(module).get(name, _ABSENT)
    if not _is_public(name):
        return "no plan sets it"
    if held is _ABSENT:
        known = name == names.GROUPS or _is_field(model, name)
        if not known or hasattr(module, name):
            return "the module has no such value"
        held = None
    if not is_plain(held):
        return f"no plan sets a {type(held).__name__}"
    if "drop" in name or (isinstance(module, nn.Dropout) and name == "p"):
        return None if _is_number(value) and value in SHARE else f"must be a number {SHARE}"
    if value is None:
        return None if held is None or type(held) is int else f"must be a {type(held).__name__}"
    if held is None:
        held = value  # what kind it would be, nothing tells
    return _find_valid_kind(held, value)


def _find_valid_kind(held: Any, value: Any) -> str | None:
    if isinstance(held, (bool, str)):
        return None if type(value) is type(held) else f"must be a {type(held).__name__}"
    if isinstance(held, int):
        sizes = value if isinstance(value, list) and value else [value]
        low = min(held, 1)
        right = all(type(size) is int and low <= size <= _MOST for size in sizes)
        return None if right else f"must be a whole number from {low} on"
    if isinstance(held, float):
        return None if _is_number(value) and math.isfinite(value) else "must be a finite number"
    if isinstance(held, (list, tuple)) and type(value) is int:  # one size where there were several
        return _find_valid_kind(max([1, *(one for one in held if type(one) is int)]), value)
    kind: type = dict if isinstance(held, dict) else list
    right = isinstance(value, kind) and is_plain(value) and _is_finite(value)
    return None if right else f"must be a {kind.__name__} of finite values"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    if isinstance(value, (list, tuple, dict)):
        return all(map(_is_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def is_plain(value: Any) -> bool:
    """Whether JSON can hold this value of an attribute, tuples as lists."""
    if isinstance(value, (tuple, list)):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    return isinstance(value, (bool, int, float, str, type(None)))


def to_plain(value: Any) -> Any:
    """Convert a plain value of an attribute to what JSON reads back, tuples to lists."""
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


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
