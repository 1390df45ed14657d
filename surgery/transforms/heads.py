"""Regroup heads: one pure function that merges, removes and reorders them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def combine_heads(
    tensors: Sequence[torch.Tensor],
    *,
    axis: int,
    unit: int,
    parts: Sequence[Sequence[int]],
    heads: int = 0,
    merge: str = "mean",
    seed: str = "",
    std: float = 0.0,
    fill: str = "",
) -> list[torch.Tensor]:
    """Make each result head of the source heads that `parts` names for it.

    Args:
        tensors: one tensor whose length along `axis` is a whole number of heads.
        axis: the axis along which the heads lie.
        unit: features per head along this axis.
        parts: per result head, the source heads that become it; other source heads are removed.
        heads: number of source heads, as a check; 0 for no check.
        merge: what several heads become: their ``mean``, the ``first`` of them, or ``random``:
            N(0, std) for matrices, zero for vectors (Ainslie et al. 2023, sec. 3.3 and figure 4).
        seed, std: for ``random``.
        fill: for `spread_heads`.

    Returns:
        One tensor of the same dtype, `len(parts) * unit` long along `axis`. A head that comes from
        only one source is its copy to the bit. Means are taken in at least fp32.

    Raises:
        ValueError: the tensor is not a whole number of heads, a head does not exist, or the merge
            is unknown.
    """
    (source,) = tensors
    if merge not in ("mean", "first", "random"):
        raise ValueError(f"unknown merge {merge!r}")
    sources = _split_units(source, axis, unit)
    if heads and heads != len(sources):
        raise ValueError(f"{len(sources)} heads, not {heads}")
    if any(not 0 <= head < len(sources) for part in parts for head in part):
        raise ValueError(f"parts name heads that do not exist: there are {len(sources)}")
    results = []
    for number, part in enumerate(parts):
        members = [sources[head] for head in part]
        if len(members) == 1 or merge == "first":
            results.append(members[0])
        elif merge == "mean":
            results.append(_average(members))
        else:
            results.append(_draw(members[0], f"{seed}:{number}", std))
    return [torch.cat(results, dim=axis).contiguous()]


def combine_tensors(
    tensors: Sequence[torch.Tensor],
    *,
    parts: Sequence[Sequence[int]],
    merge: str = "mean",
    **_: object,
) -> list[torch.Tensor]:
    """Do the same with heads that have a tensor each, all of one shape; see `combine_heads`."""
    (result,) = combine_heads(
        [torch.stack(list(tensors))], axis=0, unit=1, parts=parts, heads=len(tensors), merge=merge
    )
    return [head.clone() for head in result]


def spread_tensors(
    tensors: Sequence[torch.Tensor],
    sources: Sequence[torch.Tensor],
    *,
    parts: Sequence[Sequence[int]],
    **_: object,
) -> list[torch.Tensor]:
    """Spread the results of `combine_tensors`; see `spread_heads`."""
    stacked = [torch.stack(list(each)) for each in (tensors, sources)]
    (result,) = spread_heads(stacked[:1], stacked[1:], axis=0, unit=1, parts=parts)
    return list(result)


def spread_heads(
    tensors: Sequence[torch.Tensor],
    sources: Sequence[torch.Tensor],
    *,
    axis: int,
    unit: int,
    parts: Sequence[Sequence[int]],
    fill: str = "source",
    **_: object,
) -> list[torch.Tensor]:
    """Spread the result of `combine_heads` to its source's shape; the model computes the same.

    Args:
        tensors: one tensor of `len(parts)` heads.
        sources: the source of `combine_heads`.
        axis, unit, parts: the arguments of `combine_heads`.
        fill: what replaces removed heads: ``zero`` in the output projection, which reads them,
            their ``source`` elsewhere.

    Returns:
        One tensor in which each result head replaces every source head that became it.
    """
    (result,), (source,) = tensors, sources
    units = _split_units(result, axis, unit)
    wide = list(_split_units(torch.zeros_like(source) if fill == "zero" else source, axis, unit))
    for number, part in enumerate(parts):
        for head in part:
            wide[head] = units[number]
    return [torch.cat(wide, dim=axis)]


def _split_units(tensor: torch.Tensor, axis: int, unit: int) -> tuple[torch.Tensor, ...]:
    if tensor.shape[axis] % unit:
        raise ValueError(f"{tensor.shape[axis]} along axis {axis} is not a multiple of {unit}")
    return tensor.split(unit, dim=axis)


def _average(members: Sequence[torch.Tensor]) -> torch.Tensor:
    dtype = members[0].dtype
    wide = dtype if dtype == torch.float64 else torch.float32
    total = members[0].to(wide, copy=True)
    for member in members[1:]:
        total += member
    return (total / len(members)).to(dtype)


def _draw(like: torch.Tensor, seed: str, std: float) -> torch.Tensor:
    if like.ndim < 2 or like.is_meta:
        return torch.zeros_like(like)
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big") >> 1
    generator = torch.Generator().manual_seed(number)
    head = torch.empty(like.shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
    return head.to(device=like.device, dtype=like.dtype)
