"""Pure functions on tensors, named by plans. They know neither modules nor files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Transform = Callable[..., list[torch.Tensor]]


def pool_heads(
    tensors: Sequence[torch.Tensor],
    *,
    heads: int,
    groups: int,
    merge: str,
    seed: str = "",
    std: float = 0.0,
) -> list[torch.Tensor]:
    """Merge each run of heads / groups neighbouring heads into one.

    Args:
        tensors: one tensor [heads * d, ...].
        heads, groups: how many heads there are, how many there will be.
        merge: ``mean``, ``first``, or ``random``: N(0, std) for matrices, zero for vectors
            (Ainslie et al. 2023, section 3.3 and figure 4).

    Returns:
        One tensor [groups * d, ...] of the same dtype. Means are taken in at least fp32.
    """
    (source,) = tensors
    rest = source.shape[1:]
    grouped = source.reshape(groups, heads // groups, -1, *rest)
    if merge == "first":
        pooled = grouped[:, 0]
    elif merge == "mean":
        wide = source.dtype if source.dtype == torch.float64 else torch.float32
        pooled = grouped.to(wide).mean(dim=1).to(source.dtype)
    elif merge == "random":
        pooled = _drawn(grouped[:, 0], seed, std)
    else:
        raise ValueError(f"unknown merge {merge!r}")
    return [pooled.reshape(-1, *rest).contiguous()]


def repeat_heads(
    tensors: Sequence[torch.Tensor], *, heads: int, groups: int, **_: Any
) -> list[torch.Tensor]:
    """Back from `pool_heads` to its source's shape, without changing what the model computes.

    Args:
        tensors: one tensor [groups * d, ...].
        heads, groups: as `pool_heads` was given them.

    Returns:
        One tensor [heads * d, ...], each head standing once for every member of its group.
    """
    (pooled,) = tensors
    rest = pooled.shape[1:]
    grouped = pooled.reshape(groups, -1, *rest)
    return [grouped.repeat_interleave(heads // groups, dim=0).reshape(-1, *rest)]


def _drawn(like: torch.Tensor, seed: str, std: float) -> torch.Tensor:
    if like.ndim < 3 or like.is_meta:
        return torch.zeros_like(like)
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big") >> 1
    generator = torch.Generator().manual_seed(number)
    drawn = torch.empty(like.shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
    return drawn.to(device=like.device, dtype=like.dtype)


TRANSFORMS: dict[str, Transform] = {"pool_heads": pool_heads}
# What stands for a transform's result in the source's own shape: the oracle of `rehearse`.
EQUIVALENTS: dict[str, Transform] = {"pool_heads": repeat_heads}


def run_transform(
    name: str, tensors: Sequence[torch.Tensor], arguments: Mapping[str, Any]
) -> list[torch.Tensor]:
    """Look a transform up by name and run it."""
    return TRANSFORMS[name](tensors, **arguments)


def run_equivalent(
    name: str, results: Sequence[torch.Tensor], arguments: Mapping[str, Any]
) -> list[torch.Tensor]:
    """Tensors in the shapes of the transform's sources that do what its results do."""
    return EQUIVALENTS[name](results, **arguments)
