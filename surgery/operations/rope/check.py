"""Whether an architecture does what its `rope_parameters` would say, asked of its own code.

Some classes ignore a key, some crash on one, some hold a rotary width elsewhere. None of that is
listed anywhere; so the modules are built, on the CPU and on the meta device, and compared with
what transformers defines for the type.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from surgery.errors import ConfigError
from surgery.models.config import apply_patch, get_config_part
from surgery.models.rotary import (
    RotaryModule,
    build_rotary,
    find_layer_type,
    find_rotaries,
    find_rotary,
    list_nested_types,
    replace_parameters,
)
from surgery.models.sites import Site
from surgery.operations.rope.frequencies import (
    FAULTS,
    KEY,
    check_frequencies,
    compute_rotations,
    format_error,
    get_parameters,
    list_kinds,
)
from surgery.plan.draft import Draft
from surgery.verify.reach import Reach, probe_reach


def _check_strays(reference: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Refuse an architecture with rotations per layer, each from a config of its own."""
    known = {id(held) for held in _iterate_configs(reference.config)}
    stray = next(
        (p for p, m in find_rotaries(reference).items() if id(m.config) not in known), None
    )
    if stray is not None:
        raise ConfigError(
            KEY,
            f"{config.model_type} computes {stray} from a config of its own, which "
            "rope_parameters do not reach",
        )


def _iterate_configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _iterate_configs(value)


def check_everywhere(
    draft: Draft, prefix: str, patch: Mapping[str, Any], sites: Sequence[Site]
) -> None:
    """Check that a model with the patched config has the positions of the patch.

    Args:
        prefix: the part of the config whose positions change.
        patch: dotted config keys and values, beside those that the draft holds already.
        sites: the attention blocks that should have them.

    Raises:
        ConfigError: it has not; the key and what is valid are named.
    """
    config = draft.config
    before = _get_reference(draft, {})
    old = find_rotaries(before, get_config_part(before.config, prefix))
    if not old:
        raise make_no_rotary_error(config)
    _check_strays(before, config)
    _check_saved(config, patch, prefix)
    after = _get_reference(draft, patch)
    new = find_rotaries(after, get_config_part(after.config, prefix))
    for path in old:
        check_frequencies(old[path], new[path])
    paths = [site.path for site in sites]
    could, can = probe_reach(before, paths), probe_reach(after, paths)
    _check_used(could, config)
    for path, reach in can.items():
        if reach.fault and not (path in could and could[path].fault):
            parameters = _get_flat_parameters(get_config_part(after.config, prefix))
            partial = "partial_rotary_factor" in parameters
            raise ConfigError(
                f"{KEY}.partial_rotary_factor" if partial else f"{KEY}.type",
                f"{type(after.get_submodule(path)).__name__} cannot use it with type "
                f"{parameters['rope_type']}: {reach.fault}",
                valid="type proportional rotates a part of every head's dimensions in most "
                "architectures"
                if partial
                else None,
            )
    if not could:
        _check_shapes(before, after, prefix)


def can_say_nope(
    draft: Draft, prefix: str, patch: Mapping[str, Any], sites: Sequence[Site]
) -> bool:
    """Whether the architecture honours a patch that should leave every head unrotated (NoPE)."""
    try:
        check_everywhere(draft, prefix, patch, sites)
    except ConfigError:
        return False
    before, after = _get_reference(draft, {}), _get_reference(draft, patch)
    for old, new in _iterate_pairs(before, after, prefix):
        for kind in list_kinds(new):
            changed = get_parameters(old.config, kind) != get_parameters(new.config, kind)
            if changed and not _is_identity(compute_rotations(new, kind)):
                return False
    return True


def find_site_layer_type(draft: Draft, prefix: str, site: Site) -> str | None:
    """Find the key of `rope_parameters` with a block's positions; ``None`` for no key.

    Raises:
        ConfigError: the block has none there.
    """
    try:
        return find_layer_type(
            get_config_part(draft.config, prefix), draft.model.get_submodule(site.path)
        )
    except ValueError as error:
        raise ConfigError(f"{KEY}.layers", f"{site.path}: {error}", given=site.layer) from None


def check_sites(
    draft: Draft, sites: Sequence[Site], parameters: Mapping[str, Mapping[str, Any] | None]
) -> None:
    """Check that single blocks can be given positions of their own.

    Args:
        parameters: by module path, flat `rope_parameters`; ``None`` for NoPE.

    Raises:
        ConfigError: they cannot; the key and the block are named.
    """
    reference = _get_reference(draft, {})
    paths = [site.path for site in sites]
    reached = probe_reach(reference, paths)
    for site in sites:
        reach = reached.get(site.path)
        block = reference.get_submodule(site.path)
        if reach is None:
            _check_signature(site.path, block)
        elif not reach.fault and not reach.rotations:
            raise ConfigError(
                f"{KEY}.layers",
                f"{site.path} uses no rotations as it is",
                given=site.layer,
                valid="layers that do; null for all",
            )
        wanted = parameters[site.path]
        if wanted is None:
            continue
        if reach is not None and not reach.position_ids:
            raise ConfigError(
                f"{KEY}.layers",
                f"no position_ids reach {site.path}, so it cannot have rotations of its own",
                valid="null for all layers; type none",
            )
        _check_own(reference, site, block, wanted)


def _get_reference(draft: Draft, patch: Mapping[str, Any]) -> PreTrainedModel:
    try:
        return draft.references.get({**draft.patch, **patch})
    except ConfigError as error:
        raise ConfigError(KEY, error.problem) from None


def _check_saved(config: PreTrainedConfig, patch: Mapping[str, Any], prefix: str) -> None:
    """Check that the config is the same after it was written and read; Phi-3 renames a type."""
    changed = copy.deepcopy(config)
    try:
        apply_patch(changed, patch)
    except FAULTS:
        return  # refused in the architecture's own words, when a model is built from it
    wanted = get_config_part(changed, prefix)
    rope_type = _get_flat_parameters(wanted)["rope_type"]
    try:
        read = get_config_part(type(changed).from_dict(changed.to_dict()), prefix)
        same = read.rope_parameters == wanted.rope_parameters
    except FAULTS:
        same = False
    if not same:
        raise ConfigError(
            f"{KEY}.type", f"a saved {wanted.model_type} config does not keep it", given=rope_type
        )


def _iterate_pairs(
    before: PreTrainedModel, after: PreTrainedModel, prefix: str
) -> Iterator[tuple[RotaryModule, RotaryModule]]:
    """Yield the rotary modules of two reference models, with numbers in them."""
    old, new = (
        find_rotaries(reference, get_config_part(reference.config, prefix))
        for reference in (before, after)
    )
    for path in old:
        yield build_rotary(old[path], old[path].config), build_rotary(new[path], new[path].config)


def _check_shapes(before: PreTrainedModel, after: PreTrainedModel, prefix: str) -> None:
    """Check that rotations keep their width, where no block could be run."""
    for old, new in _iterate_pairs(before, after, prefix):
        for kind in list_kinds(new):
            was, width = (compute_rotations(module, kind)[0].shape[-1] for module in (old, new))
            if was != width:
                raise ConfigError(
                    f"{KEY}.partial_rotary_factor",
                    f"rotations would be {width} wide instead of {was}, and it cannot be seen "
                    f"whether {type(after).__name__} takes that",
                )


def _check_own(
    reference: PreTrainedModel, site: Site, block: nn.Module, parameters: Mapping[str, Any]
) -> None:
    rotary = find_rotary(reference, site.path)
    if rotary is None:
        raise ConfigError(
            f"{KEY}.layers", f"it is not clear what computes the rotations of {site.path}"
        )
    try:
        kind = find_layer_type(rotary.config, block)
        changed = replace_parameters(rotary.config, kind, parameters)
        own, old = build_rotary(rotary, changed), build_rotary(rotary, rotary.config)
        new_shape, shape = (compute_rotations(module, kind)[0].shape for module in (own, old))
    except FAULTS as error:
        raise ConfigError(f"{KEY}.type", f"{site.path}: {format_error(error)}") from None
    if new_shape != shape:
        raise ConfigError(
            f"{KEY}.partial_rotary_factor",
            f"{site.path} rotates {shape[-1]} dimensions of a head; a single layer cannot differ",
            given=parameters.get("partial_rotary_factor"),
            valid="layers null, or type proportional",
        )
    check_frequencies(old, own)


def _check_used(reached: Mapping[str, Reach], config: PreTrainedConfig) -> None:
    if reached and not any(reach.fault or reach.rotations for reach in reached.values()):
        raise make_no_rotary_error(config)


def _check_signature(path: str, block: nn.Module) -> None:
    if "position_embeddings" not in inspect.signature(block.forward).parameters:
        raise ConfigError(
            f"{KEY}.layers",
            f"{path} takes no position_embeddings from outside",
            valid="null for all layers",
        )


def make_no_rotary_error(config: PreTrainedConfig) -> ConfigError:
    """Make the error for an architecture whose positions no `rope_parameters` change."""
    return ConfigError(
        KEY,
        f"{config.model_type} models have no rotary embedding that reads rope_parameters; "
        "this operation changes positions of a model that has one",
        given=config.model_type,
        valid="a model with rotary positions; gpt2, gpt_bigcode and opt can be converted to one "
        "first",
    )


def _get_flat_parameters(config: PreTrainedConfig) -> dict[str, Any]:
    nested = list_nested_types(config)
    return get_parameters(config, nested[0] if nested else None)


def _is_identity(rotations: Any) -> bool:
    first, *rest = rotations
    return bool((first == 1).all()) and all(bool((tensor == 0).all()) for tensor in rest)
