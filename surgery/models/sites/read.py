"""Read one attention block: its projections, head counts and norms."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from surgery.models.sites import names
from surgery.models.sites.site import Norm, Packing, Projection, Site


class NotASiteError(Exception):
    """The block cannot be read as a site; the text says why."""


def read_site(
    modules: Mapping[str, nn.Module], config: PreTrainedConfig, path: str, prefix: str
) -> Site:
    """Read the attention block at `path`; `layer` is set later.

    Raises:
        NotASiteError: parts of the block are unknown, or do not fit together.
    """
    module = modules[path]
    children = _list_children(module)
    refusal = names.REFUSED.get(type(module).__name__)
    if refusal is not None:
        raise NotASiteError(refusal)
    output = _read_output(modules, path)
    query, key, value = _read_inputs(path, children, config)
    if query.packing is not None and is_cross(module, path):
        raise NotASiteError(
            f"{query.path.rpartition('.')[2]} holds keys and values of another sequence, and no "
            "queries"
        )
    if "num_experts" in vars(module) and output is None:
        raise NotASiteError("its projections are mixtures of experts")
    if output is None:
        raise NotASiteError(
            f"its output projection is not recognised (found {_join_names(children)})"
        )

    head_dim = _find_head_dim(config, module, output)
    if query.packing is None:
        sizes = _count_separate_heads(head_dim, query, key, value, output)
    else:
        sizes = _count_packed_heads(head_dim, query, output)
    q_heads, kv_heads, value_dim = sizes
    if q_heads % kv_heads:
        raise NotASiteError(f"{q_heads} query heads cannot share {kv_heads} KV heads evenly")
    query, key, value = (
        _set_unit(p, unit, kv_heads)
        for p, unit in (
            (query, head_dim if query.packing else query.out_features // q_heads),
            (key, head_dim),
            (value, value_dim),
        )
    )
    cross = is_cross(module, path)
    return Site(
        path=path,
        block=path if output.path.startswith(f"{path}.") else path.rpartition(".")[0],
        layer=0,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        hidden_size=output.out_features,
        query=query,
        key=key,
        value=value,
        output=replace(output, unit=value_dim),
        q_norm=_read_norm(path, children, names.Q_NORMS, q_heads, head_dim),
        k_norm=_read_norm(path, children, names.K_NORMS, kv_heads, head_dim),
        cached=not cross and _is_cached(module),
        cross=cross,
        config_prefix=prefix,
    )


def _list_children(module: nn.Module) -> dict[str, nn.Module]:
    """List the children by name; one that has two names comes twice."""
    return {name: child for name, child in module._modules.items() if child is not None}


def _read_inputs(
    path: str, children: Mapping[str, nn.Module], config: PreTrainedConfig
) -> tuple[Projection, Projection, Projection]:
    for triple in names.SEPARATE:
        if all(name in children for name in triple):
            query, key, value = (_read_projection(path, name, children[name]) for name in triple)
            return query, key, value
    for name, usual in names.FUSED.items():
        if name in children:
            packing = names.FUSED_BY_TYPE.get(config.model_type, usual)
            fused = replace(_read_projection(path, name, children[name]), packing=packing)
            return fused, fused, fused
    raise NotASiteError(
        f"no query, key and value projections are recognised (found {_join_names(children)})"
    )


def _read_output(modules: Mapping[str, nn.Module], path: str) -> Projection | None:
    for name in names.OUTPUTS:
        if f"{path}.{name}" in modules:
            return _read_projection(path, name, modules[f"{path}.{name}"])
    for beside in names.OUTPUTS_BESIDE:
        full = f"{path.rpartition('.')[0]}.{beside}".lstrip(".")
        if hasattr(modules.get(full), "weight"):
            parent, _, name = full.rpartition(".")
            return _read_projection(parent, name, modules[full])
    return None


def _read_projection(path: str, name: str, module: nn.Module) -> Projection:
    wrapped = getattr(module, names.WRAPPED, None)
    if isinstance(wrapped, nn.Linear):
        return _read_projection(f"{path}.{name}", names.WRAPPED, wrapped)
    if isinstance(module, Conv1D):
        wide, narrow = module.nx, module.nf
        return Projection(f"{path}.{name}", wide, narrow, bias=True, unit=0, transposed=True)
    # Not isinstance: the parts of a fused projection behave like Linears but are not.
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    weight = getattr(module, "weight", None)
    if None in sizes or not isinstance(weight, torch.Tensor):
        raise NotASiteError(f"{name} is a {name_class(module)}, not a Linear")
    if tuple(weight.shape) != sizes[::-1]:
        raise NotASiteError(
            f"{name} is a {name_class(module)} that holds a weight of {list(weight.shape)}, not "
            f"{list(sizes[::-1])}"
        )
    bias = getattr(module, "bias", None) is not None
    return Projection(f"{path}.{name}", int(sizes[0] or 0), int(sizes[1] or 0), bias, unit=0)


def name_class(module: object) -> str:
    """Name the class of a module, with its file if it is another Linear than torch's."""
    kind = type(module)
    if kind.__name__ == "Linear" and kind is not nn.Linear:
        return f"{kind.__module__}.{kind.__qualname__}"
    return kind.__name__


def _find_head_dim(config: PreTrainedConfig, module: nn.Module, output: Projection) -> int:
    stated = next((v for n in names.HEAD_DIMS if (v := _get_size(module, n))), None)
    if stated is None:
        heads = next((v for n in names.Q_HEADS if (v := _get_size(module, n))), None)
        stated = output.in_features // heads if heads else _get_size(config, "head_dim")
    if stated is None:
        heads = _get_size(config, "num_attention_heads")
        stated = output.in_features // heads if heads else None
    if stated is None:
        raise NotASiteError("neither config nor shapes tell its head_dim")
    return stated


def _get_size(holder: object, name: str) -> int | None:
    value = getattr(holder, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _count_separate_heads(
    head_dim: int,
    query: Projection,
    key: Projection,
    value: Projection,
    output: Projection,
) -> tuple[int, int, int]:
    if key.out_features % head_dim:
        raise NotASiteError("its keys are not a whole number of heads")
    kv_heads = key.out_features // head_dim
    if value.out_features % kv_heads:
        raise NotASiteError("its keys and values differ in heads")
    value_dim = value.out_features // kv_heads
    if output.in_features % value_dim:
        raise NotASiteError("the input of its output projection is not a whole number of heads")
    q_heads = output.in_features // value_dim
    # It is twice as wide if each query head has a gate beside it.
    if query.out_features not in (q_heads * head_dim, 2 * q_heads * head_dim):
        raise NotASiteError(
            f"its {query.out_features} query features are not {q_heads} heads of {head_dim}"
        )
    return q_heads, kv_heads, value_dim


def _count_packed_heads(
    head_dim: int, fused: Projection, output: Projection
) -> tuple[int, int, int]:
    if output.in_features % head_dim:
        raise NotASiteError("the input of its output projection is not a whole number of heads")
    q_heads = output.in_features // head_dim
    rest = fused.out_features - output.in_features
    if rest <= 0 or rest % (2 * head_dim):
        raise NotASiteError("its fused projection is not a whole number of heads")
    return q_heads, rest // (2 * head_dim), head_dim


def _set_unit(projection: Projection, unit: int, kv_heads: int) -> Projection:
    packing = projection.packing
    if packing is not None and packing.grouped:
        packing = Packing(packing.order, kv_heads, grouped=True)
    if packing is not None and kv_heads % packing.blocks:
        raise NotASiteError(f"its heads do not fill {packing.blocks} equal blocks")
    return replace(projection, unit=unit, packing=packing)


def _read_norm(
    path: str, children: Mapping[str, nn.Module], known: tuple[str, ...], heads: int, head_dim: int
) -> Norm | None:
    name = next((name for name in known if name in children), None)
    if name is None:
        return None
    tensors = dict(children[name].named_parameters())
    if not tensors:
        return None
    shapes = {tuple(p.shape) for p in tensors.values()}
    if any("." in tensor for tensor in tensors):
        return _read_norm_list(f"{path}.{name}", name, children[name], heads, head_dim)
    if shapes == {(heads, head_dim)}:
        return Norm(f"{path}.{name}", head_dim, tuple(tensors), rows=True)
    (size, *rest), *others = shapes
    if rest or others:
        raise NotASiteError(f"{name} has weights of several shapes")
    if size not in (head_dim, heads * head_dim):
        raise NotASiteError(f"{name} has {size} weights, which fits neither one head nor all")
    return Norm(f"{path}.{name}", size, tuple(tensors))


def _read_norm_list(path: str, name: str, module: nn.Module, heads: int, head_dim: int) -> Norm:
    """Read a norm that is a list of norms, one for each head."""
    parts = dict(module.named_children())
    each, modules = next(iter(parts.items()))
    tensors = [dict(one.named_parameters()) for one in modules.children()]
    names_of_each = {tuple(found) for found in tensors}
    shapes = {tuple(p.shape) for found in tensors for p in found.values()}
    if (
        len(parts) != 1
        or not isinstance(modules, nn.ModuleList)
        or len(tensors) != heads
        or len(names_of_each) != 1
        or shapes != {(head_dim,)}
    ):
        raise NotASiteError(f"{name} is made of parts that are not one norm for each head")
    return Norm(path, head_dim, names_of_each.pop(), each=each)


def is_cross(module: nn.Module, path: str) -> bool:
    """Whether the attention block at `path` takes keys and values from another sequence."""
    own = path.rpartition(".")[2]
    named = any(part in (own, path.split(".")[-2] if "." in path else "") for part in names.CROSS)
    return (
        named or "Cross" in type(module).__name__ or bool(getattr(module, "is_cross_attention", 0))
    )


def _is_cached(module: nn.Module) -> bool:
    # A class that serves encoders and decoders sets `is_causal` on both.
    parameters = inspect.signature(module.forward).parameters
    takes_cache = any(name in parameters for name in names.CACHES)
    causal = getattr(module, "is_causal", None)
    decoder = getattr(module, "is_decoder", None)
    if causal is None:
        return takes_cache if decoder is None else bool(decoder)
    return bool(causal)


def _join_names(children: Mapping[str, nn.Module]) -> str:
    return ", ".join(children) or "nothing"
