"""Find sites in a module tree. This works on the meta device, since only shapes matter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from surgery.models.sites import names
from surgery.models.sites.read import NotASiteError, read_site
from surgery.models.sites.site import Anatomy, Block, Site


def find_sites(model: PreTrainedModel) -> Anatomy:
    """Find every attention block of `model`; blocks that are not sites come with the reason."""
    sites: list[Site] = []
    unreadable: list[Block] = []
    left_alone: list[Block] = []
    elsewhere: list[Site] = []  # for images or sound
    modules = dict(model.named_modules())
    for path, module in _find_attention_modules(modules):
        config = _find_config(modules, path)
        prefix = _find_prefix(model.config, config)
        kind = type(module).__name__
        if _is_linear(config, module):
            reason = "linear attention has no keys to share and no cache that grows"
            left_alone.append(Block(path, kind, reason))
            continue
        other = any(sense in prefix for sense in names.OTHER_SENSES)
        try:
            site = read_site(modules, config, path, prefix)
        except NotASiteError as error:
            if other:
                left_alone.append(Block(path, kind, _explain_other_sense(prefix)))
            else:
                unreadable.append(Block(path, kind, str(error)))
        else:
            (elsewhere if other else sites).append(site)
    if sites or unreadable:
        kinds = {site.path: type(modules[site.path]).__name__ for site in elsewhere}
        left_alone += [
            Block(site.path, kinds[site.path], _explain_other_sense(site.config_prefix))
            for site in elsewhere
        ]
    else:  # a model only for images or sound
        sites = elsewhere
    windows = _list_windows(model.config)
    numbered = tuple(
        replace(site, layer=layer, window=_get_window(modules[site.path], site, windows))
        for layer, site in enumerate(sites)
    )
    return Anatomy(type(model).__name__, numbered, tuple(unreadable), tuple(left_alone))


def _list_windows(config: PreTrainedConfig) -> list[int | None]:
    """List the window of each layer as in the cache that transformers makes for this config."""
    try:
        layers = DynamicCache(config=config).layers
    except (AttributeError, ValueError, TypeError, KeyError, IndexError):
        return []  # not a text model, or its cache has no layers
    return [
        layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
        for layer in layers
    ]


def _get_window(module: nn.Module, site: Site, windows: list[int | None]) -> int | None:
    layer = getattr(module, "layer_idx", None)
    if not site.cached or not isinstance(layer, int) or layer >= len(windows):
        return None
    return windows[layer]


def get_text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the part of a config for the text model; the whole config if that is ambiguous."""
    try:
        return config.get_text_config()
    except ValueError:  # several text models in one
        return config


def _explain_other_sense(prefix: str) -> str:
    return f"it belongs to {prefix.removesuffix('.')}, not to the text model"


def _find_attention_modules(modules: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Find the innermost modules that are called attention and have their own linear maps."""
    paths = [
        path
        for path, module in modules.items()
        if _calls_itself_attention(module) and _has_maps(module)
    ]
    # If the next path starts with this one, the next module lies within this one.
    for path, following in zip_longest(paths, paths[1:], fillvalue=""):
        if not following.startswith(f"{path}."):
            yield path, modules[path]


def _calls_itself_attention(module: nn.Module) -> bool:
    name = type(module).__name__
    return "attention" in name.lower() or name.endswith("MLA")


def _has_maps(module: nn.Module) -> bool:
    children = (getattr(child, names.WRAPPED, child) for child in module.children())
    own = any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))
    return own or any(map(_is_map, children))


def _is_map(child: Any) -> bool:
    # Its weight is no parameter while it is masked or parametrized, and no tensor if it is packed.
    if isinstance(child, nn.Embedding):
        return False
    weight = getattr(child, "weight", None)
    if isinstance(weight, torch.Tensor):
        return weight.ndim > 1
    return isinstance(getattr(child, "in_features", None), int)


def _is_linear(config: PreTrainedConfig, module: nn.Module) -> bool:
    kinds, layer = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if not kinds or not isinstance(layer, int) or layer >= len(kinds):
        return False
    return kinds[layer] == "linear_attention"


def _find_config(modules: dict[str, nn.Module], path: str) -> PreTrainedConfig:
    """Find the config of the module, or of the nearest module around it that has one."""
    while True:
        config = getattr(modules[path], "config", None)
        if isinstance(config, PreTrainedConfig):
            return config
        path = path.rpartition(".")[0]


def _find_prefix(root: PreTrainedConfig, config: PreTrainedConfig) -> str:
    """Find the dotted prefix of `config` in `root`: ``text_config.``, for example."""
    if config is root:
        return ""
    for name, value in vars(root).items():
        if value is config:
            return f"{name}."
        if isinstance(value, PreTrainedConfig):
            below = _find_prefix(value, config)
            if below:
                return f"{name}.{below}"
    return ""
