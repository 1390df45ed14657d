"""Heads rewritten by calibrated coefficients: linear maps of heads, and tensors given outright."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from surgery.transforms.heads import spread_heads


def mix_heads(
    tensors: Sequence[torch.Tensor],
    *,
    axis: int,
    unit: int,
    parts: Sequence[Sequence[int]],
    uses: Sequence[Sequence[int]],
    **_: Any,
) -> list[torch.Tensor]:
    """Make each result head a linear map of the source heads that `parts` names for it.

    Args:
        tensors: the source, a whole number of heads long along `axis`; then the maps, each
            [heads, unit, members * unit].
        axis: where the heads lie.
        unit: features per head along it.
        parts: per result head, the source heads it is made of, in the order of the map's columns.
        uses: per result head, which map and which of its heads; empty: a copy.

    Returns:
        One tensor of the source's dtype, `len(parts) * unit` long along `axis`. Products are taken
        in at least fp32.

    Raises:
        ValueError: no whole number of heads, a head that is not there, or a map of another size.
    """
    source, *maps = tensors
    if source.shape[axis] % unit:
        raise ValueError(f"{source.shape[axis]} along axis {axis} is no whole number of {unit}")
    heads = source.movedim(axis, 0).unflatten(0, (-1, unit))  # [heads, unit, …]
    if any(not 0 <= head < len(heads) for part in parts for head in part):
        raise ValueError(f"parts name heads beyond the {len(heads)} there are")
    wide = source.dtype if source.dtype == torch.float64 else torch.float32
    results = []
    for part, use in zip(parts, uses, strict=True):
        members = heads[list(part)].flatten(0, 1)
        if use:
            which, number = use
            # In memory of their own: products come out differently, in the last bit, for tensors
            # that lie elsewhere in a file.
            coefficients = maps[which][number].to(device=source.device, dtype=wide, copy=True)
            if coefficients.shape != (unit, len(members)):
                raise ValueError(
                    f"a map of {tuple(coefficients.shape)} for {len(members)} features to {unit}"
                )
            mixed = coefficients @ members.to(wide).reshape(len(members), -1)
            members = mixed.view(unit, *members.shape[1:]).to(source.dtype)
        results.append(members)
    return [torch.cat(results).movedim(0, axis).contiguous()]


def put_tensor(tensors: Sequence[torch.Tensor], **_: Any) -> list[torch.Tensor]:
    """Replace a tensor by one that calibration made: [source, given] to [given].

    The result is a copy in the source's dtype, on its device.
    """
    source, given = tensors
    result = torch.empty(given.shape, dtype=source.dtype, device=source.device)
    return [result.copy_(given)]  # never the plan's own, which training would change


def spread_given(
    tensors: Sequence[torch.Tensor],
    sources: Sequence[torch.Tensor],
    *,
    parts: Sequence[Sequence[int]] | None = None,
    **arguments: Any,
) -> list[torch.Tensor]:
    """The equivalent of `put_tensor`: `spread_heads`; without `parts` the result itself."""
    if parts is None:
        return list(tensors)
    return spread_heads(tensors, sources, parts=parts, **arguments)
