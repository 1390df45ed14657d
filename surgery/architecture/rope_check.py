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

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from surgery.anatomy import Site
from surgery.architecture.config_patch import apply_patch
from surgery.architecture.reach import Reach, probe
from surgery.architecture.rope_frequencies import (
    FAULTS,
    KEY,
    compare,
    kinds,
    parameters_of,
    rotations_at,
    sentence,
)
from surgery.architecture.rotary import (
    Rotary,
    build,
    config_at,
    layer_type_of,
    nested_types,
    rotaries,
    rotary_of,
    with_parameters,
)
from surgery.errors import ConfigError

_PLAIN = (bool, int, float, str, type(None))
# What a model without rotary positions can do.
ROTARY_FIRST = (
    "a model with rotary positions; for gpt2, gpt_bigcode and opt first attention.absolute_to_rope"
)

Attributes = dict[str, dict[str, Any]]


def _check_strays(twin: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Some architectures build rotations per layer, each from a config that no one else sees."""
    known = {id(held) for held in _tree(twin.config)}
    stray = next((p for p, m in rotaries(twin).items() if id(m.config) not in known), None)
    if stray is not None:
        raise ConfigError(
            KEY,
            f"{config.model_type} computes {stray} from a config of its own, which "
            "rope_parameters do not reach",
        )


def _tree(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _tree(value)


def check_everywhere(
    skeleton: PreTrainedModel,
    config: PreTrainedConfig,
    prefix: str,
    patch: Mapping[str, Any],
    sites: Sequence[Site],
) -> Attributes:
    """Whether a model with the patched config has the positions that the patch says.

    Args:
        skeleton: the model on the meta device.
        config: its config, so far without `patch`.
        prefix: the part of the config whose positions change.
        patch: dotted config keys and values.
        sites: the attention blocks that should have them.

    Returns:
        Module path → attribute → value, for what the config decides outside the rotary modules.

    Raises:
        ConfigError: it has not; the key and what is valid are named.
    """
    before, after = _twin(skeleton, config, {}), _twin(skeleton, config, patch)
    old, new = (rotaries(twin, config_at(twin.config, prefix)) for twin in (before, after))
    if not old:
        raise ConfigError(KEY, _no_rotary(config), given=config.model_type, valid=ROTARY_FIRST)
    _check_strays(before, config)
    _check_saved(after.config, prefix)
    for path in old:
        compare(old[path], new[path])
    paths = [site.path for site in sites]
    could, can = probe(before, paths), probe(after, paths)
    _check_used(could, config)
    for path, reach in can.items():
        if reach.fault and not (path in could and could[path].fault):
            parameters = _flat(config_at(after.config, prefix))
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
    return _attributes(before, after)


def check_nope(
    skeleton: PreTrainedModel,
    config: PreTrainedConfig,
    prefix: str,
    patch: Mapping[str, Any],
    sites: Sequence[Site],
) -> Attributes | None:
    """As `check_everywhere`, for a patch that should leave every head unrotated (NoPE).

    ``None`` if the architecture does not honour it.
    """
    try:
        attributes = check_everywhere(skeleton, config, prefix, patch, sites)
    except ConfigError:
        return None
    before, after = _twin(skeleton, config, {}), _twin(skeleton, config, patch)
    for old, new in _pairs(before, after, prefix):
        for kind in kinds(new):
            changed = parameters_of(old.config, kind) != parameters_of(new.config, kind)
            if changed and not _is_identity(rotations_at(new, kind)):
                return None
    return attributes


def site_layer_type(
    skeleton: PreTrainedModel, config: PreTrainedConfig, prefix: str, site: Site
) -> str | None:
    """Under which key of `rope_parameters` a block's positions stand; ``None`` for no key.

    Raises:
        ConfigError: the block has none there.
    """
    try:
        return layer_type_of(config_at(config, prefix), skeleton.get_submodule(site.path))
    except ValueError as error:
        raise ConfigError(f"{KEY}.layers", f"{site.path}: {error}", given=site.layer) from None


def check_sites(
    skeleton: PreTrainedModel,
    config: PreTrainedConfig,
    sites: Sequence[Site],
    parameters: Mapping[str, Mapping[str, Any] | None],
) -> None:
    """Whether single blocks can be given positions of their own.

    Args:
        parameters: by module path, flat `rope_parameters`; ``None`` for NoPE.

    Raises:
        ConfigError: they cannot; the key and the block are named.
    """
    twin = _twin(skeleton, config, {})
    paths = [site.path for site in sites]
    reached = probe(twin, paths)
    for site in sites:
        reach = reached.get(site.path)
        block = twin.get_submodule(site.path)
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
        _check_own(twin, site, block, wanted)


def _twin(
    skeleton: PreTrainedModel, config: PreTrainedConfig, patch: Mapping[str, Any]
) -> PreTrainedModel:
    patched = copy.deepcopy(config)
    patched._attn_implementation = "eager"  # a twin needs no GPU
    try:
        apply_patch(patched, copy.deepcopy(dict(patch)))
        with torch.device("meta"):
            return type(skeleton)(patched)
    except FAULTS as error:
        raise ConfigError(
            KEY, f"{config.model_type} does not accept this: {sentence(error)}"
        ) from None


def _check_saved(config: PreTrainedConfig, prefix: str) -> None:
    """Whether the config says the same after it was written and read; Phi-3 renames a type."""
    wanted = config_at(config, prefix)
    rope_type = _flat(wanted)["rope_type"]
    try:
        read = config_at(type(config).from_dict(config.to_dict()), prefix)
        same = read.rope_parameters == wanted.rope_parameters
    except FAULTS:
        same = False
    if not same:
        raise ConfigError(
            f"{KEY}.type", f"a saved {wanted.model_type} config does not keep it", given=rope_type
        )


def _pairs(
    before: PreTrainedModel, after: PreTrainedModel, prefix: str
) -> Iterator[tuple[Rotary, Rotary]]:
    """The rotary modules of two twins, with numbers in them."""
    old, new = (rotaries(twin, config_at(twin.config, prefix)) for twin in (before, after))
    for path in old:
        yield build(old[path], old[path].config), build(new[path], new[path].config)


def _check_shapes(before: PreTrainedModel, after: PreTrainedModel, prefix: str) -> None:
    """Where no block could be run, what they are given must at least look as before."""
    for old, new in _pairs(before, after, prefix):
        for kind in kinds(new):
            was, width = (rotations_at(module, kind)[0].shape[-1] for module in (old, new))
            if was != width:
                raise ConfigError(
                    f"{KEY}.partial_rotary_factor",
                    f"rotations would be {width} wide instead of {was}, and it cannot be seen "
                    f"whether {type(after).__name__} takes that",
                )


def _check_own(
    twin: PreTrainedModel, site: Site, block: nn.Module, parameters: Mapping[str, Any]
) -> None:
    rotary = rotary_of(twin, site.path)
    if rotary is None:
        raise ConfigError(
            f"{KEY}.layers", f"it is not clear what computes the rotations of {site.path}"
        )
    try:
        kind = layer_type_of(rotary.config, block)
        changed = with_parameters(rotary.config, kind, parameters)
        own, old = build(rotary, changed), build(rotary, rotary.config)
        new_shape, shape = (rotations_at(module, kind)[0].shape for module in (own, old))
    except FAULTS as error:
        raise ConfigError(f"{KEY}.type", f"{site.path}: {sentence(error)}") from None
    if new_shape != shape:
        raise ConfigError(
            f"{KEY}.partial_rotary_factor",
            f"{site.path} rotates {shape[-1]} dimensions of a head; a single layer cannot differ",
            given=parameters.get("partial_rotary_factor"),
            valid="layers null, or type proportional",
        )
    compare(old, own)


def _check_used(reached: Mapping[str, Reach], config: PreTrainedConfig) -> None:
    if reached and not any(reach.fault or reach.rotations for reach in reached.values()):
        raise ConfigError(KEY, _no_rotary(config), given=config.model_type, valid=ROTARY_FIRST)


def _check_signature(path: str, block: nn.Module) -> None:
    if "position_embeddings" not in inspect.signature(block.forward).parameters:
        raise ConfigError(
            f"{KEY}.layers",
            f"{path} takes no position_embeddings from outside",
            valid="null for all layers",
        )


def _no_rotary(config: PreTrainedConfig) -> str:
    return (
        f"{config.model_type} models have no rotary embedding that reads rope_parameters; "
        "this operation changes positions of a model that has one"
    )


def _flat(config: PreTrainedConfig) -> dict[str, Any]:
    nested = nested_types(config)
    return parameters_of(config, nested[0] if nested else None)


def _is_identity(rotations: Any) -> bool:
    first, *rest = rotations
    return bool((first == 1).all()) and all(bool((tensor == 0).all()) for tensor in rest)


def _attributes(before: nn.Module, after: nn.Module) -> Attributes:
    """What else differs between two models whose configs differ in positions alone."""
    found: Attributes = {}
    old = {path: vars(module) for path, module in before.named_modules()}
    rotary = set(rotaries(after))  # type: ignore[arg-type]
    for path, module in after.named_modules():
        if path in rotary:
            continue
        values = {
            name: value
            for name, value in vars(module).items()
            if not name.startswith("_")
            and isinstance(value, _PLAIN)
            and old.get(path, {}).get(name) != value
        }
        if values:
            found[path] = values
    return found
