"""Finding sites in a module tree. Works on the meta device: only shapes are looked at."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import zip_longest

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from surgery.anatomy.site import Anatomy, Block, Norm, Projection, Site

# How separate projections are called: query, key, value, output.
_NAMES = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("q_proj", "k_proj", "v_proj", "dense"),
)
_Q_NORMS = ("q_norm", "q_layernorm", "query_norm", "query_layernorm")
_K_NORMS = ("k_norm", "k_layernorm", "key_norm", "key_layernorm")


class _NotASiteError(Exception):
    pass


def find_sites(model: PreTrainedModel) -> Anatomy:
    """Every attention block of `model`, those that are no site included, with the reason."""
    sites: list[Site] = []
    unreadable: list[Block] = []
    left_alone: list[Block] = []
    text = text_config(model.config)
    modules = dict(model.named_modules())
    for path, module in _attention_modules(modules):
        config = _config_of(modules, path)
        prefix = _prefix(model.config, config)
        if prefix and config is not text:
            reason = f"it belongs to {prefix.removesuffix('.')}, not to the text model"
            left_alone.append(Block(path, type(module).__name__, reason))
        elif _is_linear(config, module):
            reason = "linear attention has no keys to share and no cache that grows"
            left_alone.append(Block(path, type(module).__name__, reason))
        else:
            try:
                sites.append(_read(config, path, module, layer=len(sites), prefix=prefix))
            except _NotASiteError as fault:
                unreadable.append(Block(path, type(module).__name__, str(fault)))
    return Anatomy(type(model).__name__, tuple(sites), tuple(unreadable), tuple(left_alone))


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a config that describes the text model; all of it where that is ambiguous."""
    try:
        return config.get_text_config()
    except ValueError:  # several text models in one
        return config


def _attention_modules(modules: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Innermost modules that call themselves attention and hold their own linear maps."""
    found = [
        path
        for path, module in modules.items()
        if "Attention" in type(module).__name__ and _has_maps(module)
    ]
    # What follows a module in module order and starts with its path lies within it.
    for path, following in zip_longest(found, found[1:], fillvalue=""):
        if not following.startswith(f"{path}."):
            yield path, modules[path]


def _has_maps(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    for child in module.children():
        weight = getattr(child, "weight", None)
        if isinstance(weight, nn.Parameter) and not isinstance(child, nn.Embedding):
            own.append(weight)
    return any(p.ndim > 1 for p in own)


def _is_linear(config: PreTrainedConfig, module: nn.Module) -> bool:
    kinds, layer = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if not kinds or not isinstance(layer, int) or layer >= len(kinds):
        return False
    return kinds[layer] == "linear_attention"


def _read(
    config: PreTrainedConfig, path: str, module: nn.Module, *, layer: int, prefix: str
) -> Site:
    children = dict(module.named_children())
    names = next((n for n in _NAMES if all(name in children for name in n)), None)
    if names is None:
        found = ", ".join(children) or "nothing"
        raise _NotASiteError(
            f"no separate query, key, value and output projections (found {found})"
        )
    query, key, value, output = (_projection(path, name, children[name]) for name in names)

    head_dim = _head_dim(config, module, query)
    if not isinstance(head_dim, int) or query.out_features % head_dim:
        raise _NotASiteError("its head_dim cannot be told from config and shapes")
    q_heads, kv_heads = query.out_features // head_dim, key.out_features // head_dim
    if output.in_features != query.out_features:
        raise _NotASiteError("its queries are wider than its heads (gated or latent attention)")
    if value.out_features != key.out_features or key.out_features % head_dim:
        raise _NotASiteError("its keys and values differ in width")
    if q_heads % kv_heads:
        raise _NotASiteError(f"its {q_heads} query heads do not share {kv_heads} KV heads evenly")
    return Site(
        path=path,
        layer=layer,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=output.out_features,
        query=query,
        key=key,
        value=value,
        output=output,
        q_norm=_norm(path, children, _Q_NORMS, {head_dim, query.out_features}),
        k_norm=_norm(path, children, _K_NORMS, {head_dim, key.out_features}),
        groupable=hasattr(module, "num_key_value_groups"),
        cached=_is_cached(module),
        config_prefix=prefix,
    )


def _projection(path: str, name: str, module: nn.Module) -> Projection:
    if not isinstance(module, nn.Linear):
        raise _NotASiteError(f"{name} is a {type(module).__name__}, not a Linear")
    return Projection(
        f"{path}.{name}", module.in_features, module.out_features, module.bias is not None
    )


def _head_dim(config: PreTrainedConfig, module: nn.Module, query: Projection) -> object:
    stated = getattr(module, "head_dim", None) or getattr(config, "head_dim", None)
    heads = None if stated else getattr(config, "num_attention_heads", None)
    return query.out_features // heads if isinstance(heads, int) else stated


def _norm(
    path: str, children: dict[str, nn.Module], names: tuple[str, ...], sizes: set[int]
) -> Norm | None:
    name = next((name for name in names if name in children), None)
    if name is None:
        return None
    tensors = dict(children[name].named_parameters())
    if not tensors:
        return None
    shapes = {tuple(p.shape) for p in tensors.values()}
    (size, *rest), *others = shapes
    if rest or others or any("." in tensor for tensor in tensors):
        raise _NotASiteError(f"{name} has a weight per head")
    if size not in sizes:
        raise _NotASiteError(f"{name} has {size} weights, neither per head nor over all heads")
    return Norm(f"{path}.{name}", size, tuple(tensors))


def _is_cached(module: nn.Module) -> bool:
    causal = getattr(module, "is_causal", None)
    if causal is None:
        return "past_key_values" in inspect.signature(module.forward).parameters
    return bool(causal)


def _config_of(modules: dict[str, nn.Module], path: str) -> PreTrainedConfig:
    """The config of the module, or of the nearest one around it that has any."""
    while True:
        config = getattr(modules[path], "config", None)
        if isinstance(config, PreTrainedConfig):
            return config
        path = path.rpartition(".")[0]


def _prefix(root: PreTrainedConfig, config: PreTrainedConfig) -> str:
    if config is root:
        return ""
    for name, value in vars(root).items():
        if value is config:
            return f"{name}."
    return ""
