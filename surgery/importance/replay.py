"""Ablations of one layer, side by side, from where that layer's attention had been computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from surgery.importance.capture import Moment, Stack, Unfit
from surgery.importance.losses import Targets
from surgery.importance.work import Ablation, Batch, logits_of
from surgery.models.sites import Site


def resume(
    model: PreTrainedModel,
    stack: Stack,
    site: Site,
    number: int,
    moments: Sequence[Moment],
    batch: Batch,
    cuts: Sequence[Ablation],
    where: Targets,
) -> torch.Tensor:
    """Judged logits of `batch` under each of `cuts`, which are as many heads each: [A, P, V].

    The model's own forward runs over the rows, once per cut side by side, with the layers below
    answering from `moments`: embeddings, masks and positions stay its own business. In layer
    `number` what ran up to the output projection answers too, and the projection's output is
    the whole one less the share of the heads that are cut. Logits are made of judged positions
    only.

    Raises:
        Unfit: a site whose output does not leave its block as the projection put it out.
    """
    rows, times = len(where.counts), len(cuts)
    replies: dict[nn.Module, Any] = {}
    if number:
        below = tiled(moments[number - 1].output, rows, times)
        replies |= dict.fromkeys(stack.layers[:number], below)
    moment = moments[number]
    for child, output in moment.earlier.items():
        replies[child] = tiled(output, rows, times)
    projected = without(model, site, moment, cuts)
    inner = model.get_submodule(site.path)
    if site.output.path.startswith(f"{site.path}."):
        replies[inner] = _exchanged(moment, rows, times, projected)
    else:
        replies[inner] = tiled(moment.attended, rows, times)
        replies[model.get_submodule(site.output.path)] = projected
    with answering(replies), judged_only(model, where, times) as narrowed:
        logits = logits_of(
            model, {name: tiled(value, rows, times) for name, value in batch.items()}
        )
    if narrowed:
        logits = logits.reshape(times, where.total, -1)
    else:
        logits = logits.unflatten(0, (times, rows))
        logits = (
            logits[:, where.rows, where.positions] if logits.ndim == 4 else logits[:, where.rows]
        )
    return logits if logits.dtype == torch.float64 else logits.float()


def without(model: nn.Module, site: Site, moment: Moment, cuts: Sequence[Ablation]) -> torch.Tensor:
    """[A * B, N, D_model] of the output projection, without the heads of each cut.

    Cutting w features changes its output by a product of rank w: nothing else is multiplied.
    """
    if moment.inputs is None or moment.projected is None:
        raise Unfit("a site does not call its output projection")
    weight: torch.Tensor = model.get_parameter(f"{site.output.path}.weight")
    weight = weight if site.output.transposed else weight.mT  # [in, out]
    heads = torch.tensor([cut.heads for cut in cuts], device=weight.device)
    units = weight.unflatten(0, (site.q_heads, -1))[heads].flatten(1, 2)  # [A, w, out]
    inputs = moment.inputs.reshape(-1, site.q_heads, site.output.unit)
    shares = inputs[:, heads].flatten(2).movedim(1, 0)  # [A, B * N, w]
    whole = moment.projected.reshape(1, -1, units.shape[-1]).expand(len(cuts), -1, -1)
    found = torch.baddbmm(whole, shares, units, alpha=-1)
    return found.reshape(-1, *moment.projected.shape[1:])


def _exchanged(moment: Moment, rows: int, times: int, projected: torch.Tensor) -> Any:
    """What the attending module returned, with the new projection in the old one's place."""
    output = moment.attended
    if output is moment.projected:
        return projected
    if not isinstance(output, tuple) or output[0] is not moment.projected:
        raise Unfit("an attention block goes on behind its output projection")
    return (projected, *(tiled(one, rows, times) for one in output[1:]))


def tiled(value: Any, rows: int, times: int) -> Any:
    """The rows of every tensor in `value`, `times` over: [B, ...] to [times * B, ...]."""
    if isinstance(value, torch.Tensor):
        if value.ndim == 0 or len(value) != rows:
            return value
        return value.expand(times, *value.shape).flatten(0, 1)
    if isinstance(value, (tuple, list)):
        return type(value)(tiled(one, rows, times) for one in value)
    return value


@contextmanager
def answering(replies: dict[nn.Module, Any]) -> Iterator[None]:
    """Modules that return what they are told to instead of computing."""

    def reply(value: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: value

    try:
        for module, value in replies.items():
            module.forward = reply(value)
        yield
    finally:
        for module in replies:
            module.__dict__.pop("forward", None)


@contextmanager
def judged_only(model: PreTrainedModel, where: Targets, times: int) -> Iterator[list[bool]]:
    """The model's head sees judged positions alone, [1, A * P, D]; the list is empty until so."""
    head, seen = model.get_output_embeddings(), list[bool]()
    if head is None or not len(where.positions):
        yield seen
        return
    rows = len(where.counts)
    every = torch.arange(times, device=where.rows.device)[:, None] * rows + where.rows
    positions = where.positions.expand(times, -1)

    def narrow(_: nn.Module, args: tuple[Any, ...]) -> Any:
        if len(args) != 1 or args[0].ndim != 3 or len(args[0]) != times * rows:
            return None
        seen.append(True)
        return (args[0][every.flatten(), positions.flatten()][None],)

    handle = head.register_forward_pre_hook(narrow)
    try:
        yield seen
    finally:
        handle.remove()
