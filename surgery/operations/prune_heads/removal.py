"""A block whose heads are all gone, and the check that the model runs without it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from surgery.errors import PlanError, get_first_line
from surgery.models.forward import evaluating
from surgery.models.probe import make_probe_inputs
from surgery.models.sites import Site, find_sites
from surgery.verify.equivalence import FAULTS, compute_relative_distance


class RemovedAttention(nn.Module):
    """What an attention block computes when no head is left: its output projection's bias.

    Args:
        bias: [hidden_size], or ``None``.
        layer_idx: its place in the cache, which counts tokens by what layers put into it; ``None``
            for a block that caches nothing.
    """

    bias: torch.Tensor | None

    def __init__(self, bias: nn.Parameter | None, layer_idx: int | None) -> None:
        super().__init__()
        self.register_parameter("bias", bias)
        self.layer_idx = layer_idx

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, **options: Any
    ) -> tuple[torch.Tensor, None]:
        store = next((v for v in (*args, *options.values()) if isinstance(v, Cache)), None)
        if store is not None and self.layer_idx is not None:
            _count_tokens(store, hidden_states, self.layer_idx)
        silence = torch.zeros_like(hidden_states)
        return (silence if self.bias is None else silence + self.bias), None


class _TokenCounter:
    """A cache layer that knows how many tokens it has seen, though it keeps nothing of them."""

    def get_seq_length(self) -> int:
        return self.keys.shape[-2] if self.is_initialized else 0  # type: ignore[attr-defined]


@cache
def _make_counting_class(kind: type) -> type:
    return type(kind.__name__, (_TokenCounter, kind), {})


def _count_tokens(store: Cache, hidden_states: torch.Tensor, layer: int) -> None:
    """Cache keys and values of no width, as many as there are tokens."""
    store = getattr(store, "self_attention_cache", store)
    batch, length, _ = hidden_states.shape
    nothing = hidden_states.new_zeros(batch, 1, length, 0)
    store.update(nothing, nothing, layer)
    held = store.layers[layer]
    # It takes tensors without elements for no tokens.
    if isinstance(held, DynamicLayer) and length > 0 and held.get_seq_length() == 0:
        counting: Any = object.__new__(_make_counting_class(type(held)))
        vars(counting).update(vars(held))
        store.layers[layer] = counting


def remove_attention_(model: PreTrainedModel, sites: Sequence[str]) -> None:
    """Put a `RemovedAttention` in the place of every named block.

    Raises:
        PlanError: a block without an output projection of its own. No block is changed then.
    """
    found = {site.path: site for site in find_sites(model).sites}
    left = [p for p in sites if not isinstance(model.get_submodule(p), RemovedAttention)]
    for path in left:
        if path not in found or found[path].block != path:
            raise PlanError(f"{path} has no output projection of its own, so it cannot be removed")
    for path in left:
        _put_module(model, path, _make_removed(model, found[path]))


def check_removal(
    model: PreTrainedModel, sites: Sequence[Site], probe: Mapping[str, Any] | None = None
) -> None:
    """Run `model` without these blocks, and with them while nothing is read of their heads.

    This finds blocks that hand on more than their output, and forwards that expect more of them.

    Raises:
        PlanError: the two differ, or the model cannot be run without.
    """
    inputs = probe or make_probe_inputs(model, cross=any(site.cross for site in sites))
    names = ", ".join(site.path for site in sites)
    try:
        with evaluating(model), torch.no_grad():
            with _silencing(model, sites):
                expected = _compute_output(model, inputs)
            with _removing(model, sites):
                actual = _compute_output(model, inputs)
    except FAULTS as error:
        raise PlanError(
            f"the model cannot be run without {names}: {get_first_line(error)}"
        ) from error
    difference = compute_relative_distance(actual, expected)
    # Not the equivalence check's tolerance, which is wider where a GPU multiplies in TF32.
    eps = max(torch.finfo(expected.dtype).eps, torch.finfo(torch.float32).eps)
    if not difference <= math.sqrt(eps):
        raise PlanError(
            f"{names} cannot be removed: the model's output would be off by {difference:.2g} of "
            "its size from that of silent heads"
        )


def _make_removed(model: PreTrainedModel, site: Site) -> RemovedAttention:
    module, output = model.get_submodule(site.path), model.get_submodule(site.output.path)
    layer = getattr(module, "layer_idx", None) if site.cached else None
    removed = RemovedAttention(getattr(output, "bias", None), layer)
    return removed.train(module.training)


def _put_module(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _compute_output(model: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    output = model(**inputs)
    values = output.values() if isinstance(output, Mapping) else output
    return next(v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point())


@contextmanager
def _removing(model: PreTrainedModel, sites: Sequence[Site]) -> Iterator[None]:
    before = {site.path: model.get_submodule(site.path) for site in sites}
    try:
        for site in sites:
            _put_module(model, site.path, _make_removed(model, site))
        yield
    finally:
        for path, module in before.items():
            _put_module(model, path, module)


@contextmanager
def _silencing(model: PreTrainedModel, sites: Sequence[Site]) -> Iterator[None]:
    def silence(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return torch.zeros_like(args[0]), *args[1:]

    handles = [
        model.get_submodule(site.output.path).register_forward_pre_hook(silence) for site in sites
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
