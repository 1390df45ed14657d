"""Run ablations of one layer side by side, starting after the attention of that layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from surgery.data.collate import Batch
from surgery.importance.capture import LayerTrace
from surgery.importance.losses import LabelledPositions
from surgery.importance.work import Ablation, compute_logits
from surgery.models.editable import is_plain
from surgery.models.sites import Site
from surgery.models.stack import NotResumable, Stack, replaying


def resume(
    model: PreTrainedModel,
    stack: Stack,
    site: Site,
    number: int,
    traces: Sequence[LayerTrace],
    batch: Batch,
    ablations: Sequence[Ablation],
    where: LabelledPositions,
) -> torch.Tensor:
    """Compute the labelled logits of `batch` under each ablation: [A, P, V].

    The model's own forward runs over the rows, repeated once per ablation, side by side. It makes
    embeddings, masks and positions itself, but the layers below layer `number` return what is in
    `traces`. In layer `number` this holds for all modules up to the output projection, whose
    output is the one of the full pass minus the part of the ablated heads. Logits are computed
    only at labelled positions.

    Args:
        number: number of the site's layer in `stack`.
        ablations: all with the same number of heads.

    Raises:
        NotResumable: the site changes the output of its projection before it returns it, or that
            projection computes more than its weight.
    """
    rows, times = len(where.counts), len(ablations)
    replies: dict[nn.Module, Any] = {}
    if number:
        below = tile(traces[number - 1].output, rows, times)
        replies |= dict.fromkeys(stack.layers[:number], below)
    trace = traces[number]
    for child, output in trace.earlier.items():
        replies[child] = tile(output, rows, times)
    projected = project_without(model, site, trace, ablations)
    inner = model.get_submodule(site.path)
    if site.output.path.startswith(f"{site.path}."):
        replies[inner] = _replace_projection(trace, rows, times, projected)
    else:
        replies[inner] = tile(trace.attended, rows, times)
        replies[model.get_submodule(site.output.path)] = projected
    with replaying(replies), narrowing_head(model, where, times) as narrowed:
        logits = compute_logits(
            model, {name: tile(value, rows, times) for name, value in batch.items()}
        )
    if narrowed:
        logits = logits.reshape(times, where.total, -1)
    else:
        logits = logits.unflatten(0, (times, rows))
        logits = (
            logits[:, where.rows, where.positions] if logits.ndim == 4 else logits[:, where.rows]
        )
    return logits if logits.dtype == torch.float64 else logits.float()


def project_without(
    model: nn.Module, site: Site, trace: LayerTrace, ablations: Sequence[Ablation]
) -> torch.Tensor:
    """Compute the output projection without the heads of each ablation: [A * B, N, D_model].

    Removing w features changes the output by a product of rank w, so only that is multiplied.
    """
    if trace.inputs is None or trace.projected is None:
        raise NotResumable("a site does not call its output projection")
    projection: Any = model.get_submodule(site.output.path)
    if not is_plain(projection) or projection.weight.is_meta:
        raise NotResumable("its output projections are not plain Linears in memory")
    weight: torch.Tensor = projection.weight
    weight = weight if site.output.transposed else weight.mT  # [in, out]
    heads = torch.tensor([ablation.heads for ablation in ablations], device=weight.device)
    units = weight.unflatten(0, (site.q_heads, -1))[heads].flatten(1, 2)  # [A, w, out]
    inputs = trace.inputs.reshape(-1, site.q_heads, site.output.unit)
    shares = inputs[:, heads].flatten(2).movedim(1, 0)  # [A, B * N, w]
    whole = trace.projected.reshape(1, -1, units.shape[-1]).expand(len(ablations), -1, -1)
    projected = torch.baddbmm(whole, shares, units, alpha=-1)
    return projected.reshape(-1, *trace.projected.shape[1:])


def _replace_projection(trace: LayerTrace, rows: int, times: int, projected: torch.Tensor) -> Any:
    """Replace the old projection in what the attention block returned."""
    output = trace.attended
    if output is trace.projected:
        return projected
    if not isinstance(output, tuple) or output[0] is not trace.projected:
        raise NotResumable("an attention block computes something after its output projection")
    return (projected, *(tile(one, rows, times) for one in output[1:]))


def tile(value: Any, rows: int, times: int) -> Any:
    """Repeat the rows of every tensor in `value`: [B, ...] → [times * B, ...]."""
    if isinstance(value, torch.Tensor):
        if value.ndim == 0 or len(value) != rows:
            return value
        return value.expand(times, *value.shape).flatten(0, 1)
    if isinstance(value, (tuple, list)):
        return type(value)(tile(one, rows, times) for one in value)
    return value


@contextmanager
def narrowing_head(
    model: PreTrainedModel, where: LabelledPositions, times: int
) -> Iterator[list[bool]]:
    """Give the model's output head only the labelled positions, [1, A * P, D].

    The list that is yielded gets an entry when this happens.
    """
    head, narrowed = model.get_output_embeddings(), list[bool]()
    if head is None or not len(where.positions):
        yield narrowed
        return
    rows = len(where.counts)
    every = torch.arange(times, device=where.rows.device)[:, None] * rows + where.rows
    positions = where.positions.expand(times, -1)

    def narrow(_: nn.Module, args: tuple[Any, ...]) -> Any:
        if len(args) != 1 or args[0].ndim != 3 or len(args[0]) != times * rows:
            return None
        narrowed.append(True)
        return (args[0][every.flatten(), positions.flatten()][None],)

    handle = head.register_forward_pre_hook(narrow)
    try:
        yield narrowed
    finally:
        handle.remove()
