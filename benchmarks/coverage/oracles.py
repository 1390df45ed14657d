"""What each operation must compute, told by models that were never operated on.

None of these knows how an architecture lays out its projections: heads are shared where attention
is called, and removed where the output projection reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from surgery.models.sites import Site


@contextmanager
def first_heads_shared(
    model: PreTrainedModel, groups: Mapping[str, int]
) -> Iterator[dict[str, int]]:
    """Every group's first KV head stands in for all of it, where attention is called.

    Args:
        groups: site path → KV heads afterwards.

    Yields:
        Site path → how often its attention was called.
    """
    wanted = {id(model.get_submodule(path)): (path, count) for path, count in groups.items()}
    calls = dict.fromkeys(groups, 0)
    untouched = AttentionInterface.get_interface

    def get(self: AttentionInterface, implementation: str, default: Callable[..., Any]) -> Any:
        attend = untouched(self, implementation, default)

        def shared(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any
        ) -> Any:
            if id(module) in wanted:
                path, count = wanted[id(module)]
                calls[path] += 1
                key, value = _first(key, count), _first(value, count)
            return attend(module, query, key, value, *args, **options)

        return shared

    AttentionInterface.get_interface = get  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        AttentionInterface.get_interface = untouched  # type: ignore[method-assign]


@contextmanager
def attention_within(
    model: PreTrainedModel, paths: Sequence[str], size: int
) -> Iterator[list[str]]:
    """In these blocks a query sees itself and the `size` - 1 tokens before it, by its mask.

    Only where masks are numbers that are added to scores, as eager attention has them.

    Yields:
        The paths whose attention was called.
    """
    wanted = {id(model.get_submodule(path)): path for path in paths}
    called: list[str] = []
    untouched = AttentionInterface.get_interface

    def get(self: AttentionInterface, implementation: str, default: Callable[..., Any]) -> Any:
        attend = untouched(self, implementation, default)

        def within(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None,
            *args: Any,
            **options: Any,
        ) -> Any:
            if id(module) in wanted:
                called.append(wanted[id(module)])
                assert attention_mask is not None
                mask = attention_mask[..., : key.shape[-2]]
                places = torch.arange(key.shape[-2])
                outside = places[None, :] <= places[: query.shape[-2], None] - size
                attention_mask = mask.masked_fill(outside, torch.finfo(mask.dtype).min)
            return attend(module, query, key, value, attention_mask, *args, **options)

        return within

    AttentionInterface.get_interface = get  # type: ignore[method-assign]
    try:
        yield called
    finally:
        AttentionInterface.get_interface = untouched  # type: ignore[method-assign]


@contextmanager
def heads_silenced(
    model: PreTrainedModel, sites: Sequence[Site], heads: Mapping[str, Sequence[int]]
) -> Iterator[None]:
    """The named heads' slices of the output projection's input are zero.

    Args:
        heads: site path → query heads.
    """
    handles = []
    for site in sites:
        size = site.output.in_features // site.q_heads

        def silence(
            module: nn.Module, args: tuple[Tensor, ...], size: int = size, path: str = site.path
        ) -> tuple[Tensor, ...]:
            states = args[0].clone()
            for head in heads.get(path, ()):
                states[..., head * size : (head + 1) * size] = 0
            return (states, *args[1:])

        handles.append(model.get_submodule(site.output.path).register_forward_pre_hook(silence))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def first_heads_written_(
    model: PreTrainedModel, sites: Sequence[Site], groups: Mapping[str, int]
) -> None:
    """The same by rewriting weights, where attention is not called through the interface, or keys
    are normalised over all heads together: sharing after that norm would be something else.
    """
    for site in sites:
        module = model.get_submodule(site.path)
        size = site.kv_heads // groups[site.path]
        if site.packing is not None and not site.packing.grouped:  # GPT-2: all queries first
            start, heads = site.q_heads * site.head_dim, site.kv_heads
            for tensor in model.get_submodule(site.query.path).parameters():
                rows = tensor.mT if tensor.ndim > 1 and site.query.transposed else tensor
                units = rows[start:].unflatten(0, (2, heads, -1))
                units.copy_(units[:, ::size].repeat_interleave(size, dim=1))
            continue
        if site.packing is not None:  # Falcon: each KV head after the queries that share it
            own = site.group_size * site.head_dim
            for tensor in model.get_submodule(site.query.path).parameters():
                heads = tensor.unflatten(0, (site.kv_heads, -1))
                heads[:, own:] = heads[::size, own:].repeat_interleave(size, dim=0)
            continue
        norm = [p for n, p in module.named_parameters() if n.startswith("k_norm.")]
        projections = [model.get_submodule(p.path) for p in (site.key, site.value)]
        for tensor in [p for m in projections for p in m.parameters()] + norm:
            heads = tensor.unflatten(0, (site.kv_heads, -1))
            tensor.copy_(heads[::size].repeat_interleave(size, dim=0).flatten(0, 1))


def _first(states: Tensor, groups: int) -> Tensor:
    """[batch, heads, keys, head_dim], each run of heads / groups given its first one."""
    size = states.shape[1] // groups
    return states[:, ::size].repeat_interleave(size, dim=1)
