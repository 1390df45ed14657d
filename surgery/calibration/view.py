"""Observe one site in a forward pass: its projections, its attention and its output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from surgery.calibration.rows import get_head_features
from surgery.data.collate import Batch
from surgery.errors import SiteError
from surgery.importance.batches import run_model
from surgery.models.packed import make_inputs
from surgery.models.sites import Site
from surgery.observe import AttentionCall, Tap


@dataclass
class SiteView:
    """What a site did with one batch.

    Attributes:
        query, key, value: [B, S, heads, unit], the outputs of the projections.
        call: the attention call; ``None`` if not asked for.
        inputs: [B, N, Hq * D], the input of the output projection.
        output: [B, N, D_model], the output of the output projection.
        block: arguments with which the site's block was called.
        real, real_keys: [B, N] and [B, S], which queries and keys are not padding; ``None``: all.
        masks: masks of queries, and of a decoder's queries, as for `Tap.open`.
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


class _StopForward(Exception):  # noqa: N818  (not an error: the rest of the pass is not needed)
    """Ends a forward pass after the observed site."""


@dataclass(frozen=True)
class Aim:
    """What a site should put out for one batch.

    Attributes:
        target: [B, N, D_model].
        scale: [B, N], by which errors are multiplied, position by position.
    """

    target: torch.Tensor
    scale: torch.Tensor


@dataclass(frozen=True)
class KeptBatch:
    """The inputs of one site for one batch, so that no layer below has to run again.

    Attributes:
        args, kwargs: arguments with which the block was called.
        aim: what the site should put out.
        real: [B, N], which queries are not padding; ``None``: all.
        masks: masks of queries, and of a decoder's queries, as for `Tap.open`.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    aim: Aim
    real: torch.Tensor | None
    masks: tuple[torch.Tensor | None, torch.Tensor | None]


@torch.no_grad()
def observe_site(
    model: PreTrainedModel, site: Site, batch: Batch | KeptBatch, *, attention: bool = True
) -> SiteView:
    """Run `model` up to and including `site`, or only the site's block on kept inputs.

    Args:
        attention: whether projections and the attention call are wanted, or only the output.

    Raises:
        SiteError: the site was not used, or does not use transformers' attention interface.
    """
    view = SiteView()
    if isinstance(batch, KeptBatch):
        masks, view.masks = batch.masks, batch.masks
    else:
        inputs = _move_inputs(model, batch)
        masks = view.masks = inputs.get("attention_mask"), inputs.get("decoder_attention_mask")
    with ExitStack() as stack:
        _record_site(stack, model, site, view, attention)
        tap = stack.enter_context(Tap(model, lambda call: _keep_call(call, site, view)))
        tap.open(query_mask=masks[0], decoder_mask=masks[1])
        try:
            if isinstance(batch, KeptBatch):
                model.get_submodule(site.block)(*batch.args, **batch.kwargs)
            else:
                run_model(model, make_inputs(model, inputs))
        except _StopForward:
            pass
    if view.output is None:
        raise SiteError(site.path, "it took no part in a forward pass over the calibration data")
    if view.call is None:
        raise SiteError(
            site.path, "its attention does not go through transformers' AttentionInterface"
        )
    view.real = _find_real(view.call.query_mask, view.call.query.shape[2])
    # In cross-attention, queries come from the decoder and keys from the encoder.
    view.real_keys = _find_real(masks[0], view.call.key.shape[2]) if site.cross else view.real
    if not attention:
        view.call = None
    return view


@torch.no_grad()
def run_until(model: PreTrainedModel, batch: Batch, module: nn.Module) -> Any:
    """Run a pass over a batch until `module` has returned; get what it returned.

    Raises:
        SiteError: it was not called.
    """
    found: list[Any] = []

    def stop(_: nn.Module, args: Any, output: Any) -> None:
        found.append(copy_value(output))
        raise _StopForward

    handle = module.register_forward_hook(stop)
    try:
        run_model(model, make_inputs(model, _move_inputs(model, batch)))
    except _StopForward:
        pass
    finally:
        handle.remove()
    if not found:
        name = next(name for name, one in model.named_modules() if one is module)
        raise SiteError(name, "it took no part in a forward pass over the calibration data")
    return found[0]


def _move_inputs(model: PreTrainedModel, batch: Batch) -> dict[str, torch.Tensor]:
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in batch.items() if name != "labels"}


def _find_real(mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    if mask is None or mask.ndim != 2 or mask.shape[1] < length:
        return None
    return mask[:, -length:].bool()


def _keep_call(call: AttentionCall, site: Site, view: SiteView) -> None:
    if call.site == site.path or call.site.startswith(f"{site.block}."):
        view.call = call


def _record_site(
    stack: ExitStack, model: PreTrainedModel, site: Site, view: SiteView, attention: bool
) -> None:
    def add_hook(path: str, function: Callable[..., Any], *, pre: bool = False) -> None:
        module = model.get_submodule(path)
        if pre:
            handle = module.register_forward_pre_hook(function, with_kwargs=True)
        else:
            handle = module.register_forward_hook(function, with_kwargs=True)
        stack.callback(handle.remove)

    def keep_projection(role: str) -> Callable[..., None]:
        def keep(_: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> None:
            setattr(view, role, get_head_features(site, role, output))

        return keep

    def keep_output(_: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> None:
        view.inputs = args[0] if args else next(iter(kwargs.values()))
        view.output = output

    def keep_arguments(_: nn.Module, args: Any, kwargs: Any) -> None:
        # Some forward passes change their inputs in place later.
        view.block = copy_value(args), {k: copy_value(v) for k, v in kwargs.items()}

    def stop(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        raise _StopForward

    if attention:
        for role in ("query", "key", "value"):
            add_hook(site.get_projection(role).path, keep_projection(role))
    add_hook(site.output.path, keep_output)
    add_hook(site.block, keep_arguments, pre=True)
    add_hook(site.block, stop)


def copy_value(value: Any) -> Any:
    """Copy the tensors of numbers in `value`; a cache becomes ``None``, for a fresh start."""
    if isinstance(value, Cache):
        return None
    if isinstance(value, (tuple, list)):
        copied = [copy_value(one) for one in value]
        return type(value)(*copied) if hasattr(value, "_fields") else type(value)(copied)
    return value.clone() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@contextmanager
def capturing_output(model: nn.Module, path: str) -> Iterator[list[torch.Tensor]]:
    """Collect the outputs of the module at `path`, with their gradients."""
    outputs: list[torch.Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(
        lambda _, args, output: outputs.append(output)
    )
    try:
        yield outputs
    finally:
        handle.remove()
