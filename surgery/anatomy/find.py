"""Finding sites in a module tree. Works on the meta device: only shapes are looked at."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from surgery.anatomy.site import Anatomy, Norm, Projection, Site, Unreadable

# How separate projections are called: query, key, value, output.
_NAMES = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("q_proj", "k_proj", "v_proj", "dense"),
)
_Q_NORMS = ("q_norm", "q_layernorm", "query_norm")
_K_NORMS = ("k_norm", "k_layernorm", "key_norm")


class _NotASite(Exception):
    pass


def find_sites(model: PreTrainedModel) -> Anatomy:
    """Every attention block of `model`, those that cannot be read included with the reason."""
    sites: list[Site] = []
    unreadable: list[Unreadable] = []
    for path, module in _attention_modules(model):
        try:
            sites.append(_read(model, path, module, layer=len(sites)))
        except _NotASite as reason:
            unreadable.append(Unreadable(path, type(module).__name__, str(reason)))
    return Anatomy(type(model).__name__, tuple(sites), tuple(unreadable))


def _attention_modules(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Modules that call themselves attention and hold their own linear maps."""
    for path, module in model.named_modules():
        if "Attention" in type(module).__name__ and any(
            isinstance(getattr(child, "weight", None), nn.Parameter)
            for child in module.children()
        ):
            yield path, module


def _read(model: PreTrainedModel, path: str, module: nn.Module, layer: int) -> Site:
    children = dict(module.named_children())
    names = next((n for n in _NAMES if all(name in children for name in n)), None)
    if names is None:
        found = ", ".join(children) or "nothing"
        raise _NotASite(f"no separate query, key, value and output projections (found {found})")
    query, key, value, output = (_projection(path, name, children[name]) for name in names)

    config = _config_of(module, model)
    heads = getattr(config, "num_attention_heads", None)
    head_dim = getattr(module, "head_dim", None) or getattr(config, "head_dim", None)
    if head_dim is None and isinstance(heads, int):
        head_dim = query.out_features // heads
    if not isinstance(head_dim, int) or query.out_features % head_dim:
        raise _NotASite("its head_dim cannot be told from config and shapes")
    q_heads, kv_heads = query.out_features // head_dim, key.out_features // head_dim
    if output.in_features != query.out_features:
        raise _NotASite("its queries are wider than its heads (gated or latent attention)")
    if value.out_features != key.out_features or key.out_features % head_dim:
        raise _NotASite("its keys and values differ in width")
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
        q_norm=_norm(path, children, _Q_NORMS),
        k_norm=_norm(path, children, _K_NORMS),
        groupable=hasattr(module, "num_key_value_groups"),
        cached=bool(getattr(module, "is_causal", False)),
        config_prefix=_prefix(model.config, config),
    )


def _projection(path: str, name: str, module: nn.Module) -> Projection:
    if not isinstance(module, nn.Linear):
        raise _NotASite(f"{name} is a {type(module).__name__}, not a Linear")
    return Projection(
        f"{path}.{name}", module.in_features, module.out_features, module.bias is not None
    )


def _norm(path: str, children: dict[str, nn.Module], names: tuple[str, ...]) -> Norm | None:
    for name in names:
        if name in children:
            tensors = {key: p for key, p in children[name].named_parameters()}
            if not tensors:
                return None
            if any(p.ndim != 1 for p in tensors.values()):
                raise _NotASite(f"{name} has a weight per head")
            return Norm(f"{path}.{name}", next(iter(tensors.values())).numel(), tuple(tensors))
    return None


def _config_of(module: nn.Module, model: PreTrainedModel) -> PreTrainedConfig:
    config = getattr(module, "config", None)
    return config if isinstance(config, PreTrainedConfig) else model.config.get_text_config()


def _prefix(root: PreTrainedConfig, config: PreTrainedConfig) -> str:
    if config is root:
        return ""
    for name, value in vars(root).items():
        if value is config:
            return f"{name}."
    return ""
