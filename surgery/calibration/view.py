"""One site seen in a forward pass: its projections, its attention, and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from surgery.calibration.rows import features
from surgery.errors import SiteError
from surgery.models.forward import get_forward_options
from surgery.models.sites import Site
from surgery.observe import AttentionCall, Tap

Batch = Mapping[str, torch.Tensor]


@dataclass
class SiteView:
    """What a site did with one batch.

    Attributes:
        query, key, value: [B, S, heads, unit], as the projections put them out.
        call: the attention call; ``None`` where it was not asked for.
        inputs: [B, N, Hq * D], what the output projection was given.
        output: [B, N, D_model], what it made of it.
        block: arguments that the site's block was called with.
        real, real_keys: [B, N] and [B, S], which of them are no padding; ``None``: all.
        masks: of queries, and of a decoder's queries, as the tap was told them.
    """

    query: torch.Tensor | None = None
    key: torch.Tensor | None = None
    value: torch.Tensor | None = None
    call: AttentionCall | None = None
    inputs: torch.Tensor | None = None
    output: torch.Tensor | None = None
    block: tuple[tuple[Any, ...], dict[str, Any]] = field(default_factory=lambda: ((), {}))
    real: torch.Tensor | None = None
    real_keys: torch.Tensor | None = None
    masks: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)


class _Seen(Exception):  # noqa: N818  (no error: the rest of the pass is not needed)
    """Ends a forward pass behind the site that was wanted."""


@dataclass(frozen=True)
class Kept:
    """One batch as it reaches one site, so that no layer below has to run again.

    Attributes:
        args, kwargs: what the block was called with.
        target: [B, N, D_model], the original's output there.
        real: [B, N], which queries count; ``None``: all.
        masks: of queries, and of a decoder's queries, as a tap is told them.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: torch.Tensor
    real: torch.Tensor | None
    masks: tuple[torch.Tensor | None, torch.Tensor | None]


@torch.no_grad()
def see(
    model: PreTrainedModel, site: Site, batch: Batch | Kept, *, attention: bool = True
) -> SiteView:
    """Run `model` up to and including `site`; or its block alone, on inputs that were kept.

    Args:
        attention: whether the projections and the attention call are wanted, or the output alone.

    Raises:
        SiteError: the site took no part, or attends past transformers' interface.
    """
    view = SiteView()
    if isinstance(batch, Kept):
        masks, view.masks = batch.masks, batch.masks
    else:
        device = next(model.parameters()).device
        inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
        masks = view.masks = inputs.get("attention_mask"), inputs.get("decoder_attention_mask")
    with ExitStack() as stack:
        _watch(stack, model, site, view, attention)
        tap = stack.enter_context(Tap(model, lambda call: _took(call, site, view)))
        tap.open(query_mask=masks[0], decoder_mask=masks[1])
        try:
            if isinstance(batch, Kept):
                model.get_submodule(site.block)(*batch.args, **batch.kwargs)
            else:
                model(**inputs, **get_forward_options(model))
        except _Seen:
            pass
    if view.output is None:
        raise SiteError(site.path, "it took no part in a forward pass over the calibration data")
    if view.call is None:
        raise SiteError(
            site.path, "its attention does not go through transformers' AttentionInterface"
        )
    view.real = _real(view.call.query_mask, view.call.query.shape[2])
    # Across, queries are a decoder's and keys are the encoder's.
    view.real_keys = _real(masks[0], view.call.key.shape[2]) if site.cross else view.real
    if not attention:
        view.call = None
    return view


def _real(mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    if mask is None or mask.ndim != 2 or mask.shape[1] < length:
        return None
    return mask[:, -length:].bool()


def _took(call: AttentionCall, site: Site, view: SiteView) -> None:
    if call.site == site.path or call.site.startswith(f"{site.block}."):
        view.call = call


def _watch(
    stack: ExitStack, model: PreTrainedModel, site: Site, view: SiteView, attention: bool
) -> None:
    def hooked(path: str, function: Callable[..., Any], *, pre: bool = False) -> None:
        module = model.get_submodule(path)
        if pre:
            handle = module.register_forward_pre_hook(function, with_kwargs=True)
        else:
            handle = module.register_forward_hook(function, with_kwargs=True)
        stack.callback(handle.remove)

    def projected(role: str) -> Callable[..., None]:
        def took(_: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> None:
            setattr(view, role, features(site, role, output))

        return took

    def put_out(_: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        view.inputs, view.output = given, output

    def called(_: nn.Module, args: Any, kwargs: Any) -> None:
        # Some forwards add to their inputs in place later on.
        view.block = tuple(map(_copied, args)), {k: _copied(v) for k, v in kwargs.items()}

    def done(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        raise _Seen

    if attention:
        for role in ("query", "key", "value"):
            hooked(site.get_projection(role).path, projected(role))
    hooked(site.output.path, put_out)
    hooked(site.block, called, pre=True)
    hooked(site.block, done)


def _copied(value: Any) -> Any:
    if isinstance(value, Cache):  # the block will run again, and must start without
        return None
    return value.clone() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@contextmanager
def captured_output(model: nn.Module, path: str) -> Iterator[list[torch.Tensor]]:
    """Whatever the module at `path` puts out meanwhile, gradients and all."""
    found: list[torch.Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(
        lambda _, args, output: found.append(output)
    )
    try:
        yield found
    finally:
        handle.remove()
