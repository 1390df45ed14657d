"""Finding sites in a module tree. Works on the meta device: only shapes are looked at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest

from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from surgery.models.sites import names
from surgery.models.sites.read import NotASiteError, read_site
from surgery.models.sites.site import Anatomy, Block, Site


def find_sites(model: PreTrainedModel) -> Anatomy:
    """Every attention block of `model`, those that are no site included, with the reason."""
    sites: list[Site] = []
    unreadable: list[Block] = []
    left_alone: list[Block] = []
    elsewhere: list[Site] = []  # of another sense than text
    modules = dict(model.named_modules())
    for path, module in _attention_modules(modules):
        config = _config_of(modules, path)
        prefix = _prefix(model.config, config)
        kind = type(module).__name__
        if _is_linear(config, module):
            reason = "linear attention has no keys to share and no cache that grows"
            left_alone.append(Block(path, kind, reason))
            continue
        other = any(sense in prefix for sense in names.OTHER_SENSES)
        try:
            site = read_site(modules, config, path, prefix)
        except NotASiteError as fault:
            if other:
                left_alone.append(Block(path, kind, _of_other_sense(prefix)))
            else:
                unreadable.append(Block(path, kind, str(fault)))
        else:
            (elsewhere if other else sites).append(site)
    if sites or unreadable:
        kinds = {site.path: type(modules[site.path]).__name__ for site in elsewhere}
        left_alone += [
            Block(site.path, kinds[site.path], _of_other_sense(site.config_prefix))
            for site in elsewhere
        ]
    else:  # a model of images or sounds alone
        sites = elsewhere
    windows = _windows(model.config)
    numbered = tuple(
        replace(site, layer=layer, window=_window(modules[site.path], site, windows))
        for layer, site in enumerate(sites)
    )
    return Anatomy(type(model).__name__, numbered, tuple(unreadable), tuple(left_alone))


def _windows(config: PreTrainedConfig) -> list[int | None]:
    """The window of each layer, as the cache that transformers makes for this config has it."""
    try:
        layers = DynamicCache(config=config).layers
    except (AttributeError, ValueError, TypeError, KeyError, IndexError):
        return []  # no text model, or none that caches layer by layer
    return [
        layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
        for layer in layers
    ]


def _window(module: nn.Module, site: Site, windows: list[int | None]) -> int | None:
    layer = getattr(module, "layer_idx", None)
    if not site.cached or not isinstance(layer, int) or layer >= len(windows):
        return None
    return windows[layer]


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a config that describes the text model; all of it where that is ambiguous."""
    try:
        return config.get_text_config()
    except ValueError:  # several text models in one
        return config


def _of_other_sense(prefix: str) -> str:
    return f"it belongs to {prefix.removesuffix('.')}, not to the text model"


def _attention_modules(modules: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Innermost modules that call themselves attention and hold their own linear maps."""
    found = [
        path
        for path, module in modules.items()
        if _calls_itself_attention(module) and _has_maps(module)
    ]
    # What follows a module in module order and starts with its path lies within it.
    for path, following in zip_longest(found, found[1:], fillvalue=""):
        if not following.startswith(f"{path}."):
            yield path, modules[path]


def _calls_itself_attention(module: nn.Module) -> bool:
    name = type(module).__name__
    return "attention" in name.lower() or name.endswith("MLA")


def _has_maps(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    for child in module.children():
        child = getattr(child, names.WRAPPED, child)
        weight = getattr(child, "weight", None)
        if isinstance(weight, nn.Parameter) and not isinstance(child, nn.Embedding):
            own.append(weight)
    return any(p.ndim > 1 for p in own)


def _is_linear(config: PreTrainedConfig, module: nn.Module) -> bool:
    kinds, layer = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if not kinds or not isinstance(layer, int) or layer >= len(kinds):
        return False
    return kinds[layer] == "linear_attention"


def _config_of(modules: dict[str, nn.Module], path: str) -> PreTrainedConfig:
    """The config of the module, or of the nearest one around it that has any."""
    while True:
        config = getattr(modules[path], "config", None)
        if isinstance(config, PreTrainedConfig):
            return config
        path = path.rpartition(".")[0]


def _prefix(root: PreTrainedConfig, config: PreTrainedConfig) -> str:
    """Where `config` hangs below `root`: ``text_config.``, ``thinker_config.text_config.``…"""
    if config is root:
        return ""
    for name, value in vars(root).items():
        if value is config:
            return f"{name}."
        if isinstance(value, PreTrainedConfig):
            below = _prefix(value, config)
            if below:
                return f"{name}.{below}"
    return ""
