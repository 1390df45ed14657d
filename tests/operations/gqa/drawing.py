"""Random correlated moments of keys and values, with the samples that they are the moments of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from surgery.operations.gqa.keys import KeyMoments
from surgery.operations.gqa.planes import Planes, make_half_split, make_interleaved

F64 = torch.float64


@dataclass(repr=False)
class Drawn:
    """Attributes:
    keys: [T, heads, D]; queries: [T, heads, D], one query head for each KV head.
    """

    layout: Planes
    keys: Tensor
    queries: Tensor
    moments: KeyMoments


def features(heads: int, size: int, rank: int, seed: int, tokens: int = 200) -> Tensor:
    """[T, heads, size] of `rank` hidden causes, unevenly strong; heads differ in size."""
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(tokens, rank, generator=generator, dtype=F64)
    causes = causes * torch.logspace(0, -1.5, rank, dtype=F64)
    mixing = torch.randn(rank, heads * size, generator=generator, dtype=F64)
    own = torch.rand(heads, 1, generator=generator, dtype=F64) + 0.1
    return (causes @ mixing).view(tokens, heads, size) * own


def moments_of(layout: Planes, keys: Tensor, queries: Tensor) -> KeyMoments:
    """By the definitions, from samples."""
    count, heads, _ = keys.shape
    planes = layout.to_complex(keys)
    free = list(layout.free)
    rest = keys[..., free]
    rest = (rest - rest.mean(0)).flatten(1)
    read = queries[..., free]
    return KeyMoments(
        layout=layout,
        planes=torch.einsum("thp,tgp->phg", planes, planes.conj()) / count,
        power=layout.to_complex(queries).abs().pow(2).mean(0).mT.contiguous(),
        free=rest.mT @ rest / count,
        metric=torch.stack([read[:, h].mT @ read[:, h] / count for h in range(heads)]),
    )


@st.composite
def drawn(draw: st.DrawFn, max_heads: int = 4) -> Drawn:
    heads = draw(st.integers(1, max_heads))
    planes, free = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    if planes + free == 0:
        planes = 1
    size, rotated = 2 * planes + free, 2 * planes
    layout = draw(st.sampled_from([make_half_split, make_interleaved]))(size, rotated)
    seed = draw(st.integers(0, 999))
    rank = draw(st.integers(1, heads * size + 2))  # often too few for full rank
    keys = features(heads, size, rank, seed)
    queries = features(heads, size, draw(st.integers(1, 2 * size)), seed + 1)
    if draw(st.booleans()):
        keys[:, draw(st.integers(0, heads - 1))] = 0.0
    if draw(st.booleans()):
        queries[:, draw(st.integers(0, heads - 1))] = 0.0
    return Drawn(layout, keys, queries, moments_of(layout, keys, queries))


def rotations(layout: Planes, angles: Tensor) -> Tensor:
    """[positions, D, D]: what a position does to a head; `angles` is [positions, planes]."""
    count, size = len(angles), layout.size
    made = torch.zeros(count, size, size, dtype=F64)
    for feature in layout.free:
        made[:, feature, feature] = 1.0
    for plane, (a, b) in enumerate(layout.pairs):
        cos, sin = angles[:, plane].cos(), angles[:, plane].sin()
        made[:, a, a] = made[:, b, b] = cos
        made[:, b, a], made[:, a, b] = sin, -sin
    return made
