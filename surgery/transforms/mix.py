"""Rewrite heads with calibrated tensors: linear maps of heads, and whole tensors."""

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
        tensors: the source, whose length along `axis` is a whole number of heads; then the maps,
            each [heads, unit, members * unit].
        axis: the axis along which the heads lie.
        unit: features per head along this axis.
        parts: per result head, its source heads, in the order of the map's columns.
        uses: per result head, which map and which of its heads; empty: a copy.

    Returns:
        One tensor of the source's dtype, `len(parts) * unit` long along `axis`. Products are taken
        in at least fp32.

    Raises:
        ValueError: the source is not a whole number of heads, a head does not exist, or a map has
            another size.
    """
    source, *maps = tensors
    if source.shape[axis] % unit:
        raise ValueError(f"{source.shape[axis]} along axis {axis} is not a multiple of {unit}")
    heads = source.movedim(axis, 0).unflatten(0, (-1, unit))  # [heads, unit, …]
    if any(not 0 <= head < len(heads) for part in parts for head in part):
        raise ValueError(f"parts name heads that do not exist: there are {len(heads)}")
    wide = source.dtype if source.dtype == torch.float64 else torch.float32
    results = []
    for part, use in zip(parts, uses, strict=True):
        members = heads[list(part)].flatten(0, 1)
        if use:
            which, number = use
            # A copy: the last bit of a product can depend on where a tensor lies in memory.
            coefficients = maps[which][number].to(device=source.device, dtype=wide, copy=True)
            if coefficients.shape != (unit, len(members)):
                raise ValueError(
                    f"a map has shape {tuple(coefficients.shape)}, not ({unit}, {len(members)})"
                )
            mixed = coefficients @ members.to(wide).reshape(len(members), -1)
            members = mixed.view(unit, *members.shape[1:]).to(source.dtype)
        results.append(members)
    return [torch.cat(results).movedim(0, axis).contiguous()]


def put_tensor(tensors: Sequence[torch.Tensor], **_: Any) -> list[torch.Tensor]:
    """Replace a tensor by a calibrated one: [source, calibrated] → [calibrated].

    The result is a copy in the source's dtype, on its device.
    """
    source, calibrated = tensors
    result = torch.empty(calibrated.shape, dtype=source.dtype, device=source.device)
    return [result.copy_(calibrated)]  # a copy, since training would change the plan's tensor


def spread_put_tensor(
    tensors: Sequence[torch.Tensor],
    sources: Sequence[torch.Tensor],
    *,
    parts: Sequence[Sequence[int]] | None = None,
    **arguments: Any,
) -> list[torch.Tensor]:
    """Spread the result of `put_tensor` with `spread_heads`; without `parts` return it as it is."""
    if parts is None:
        return list(tensors)
    return spread_heads(tensors, sources, parts=parts, **arguments)
