"""The dimensions of a key head: planes that positions turn, and free ones that they do not."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Planes:
    """Which features of a head are turned together by its position, and which by none.

    Attributes:
        pairs: (a, b) of every rotated plane; features a and b are its real and imaginary part.
        free: features that no position turns.
    """

    pairs: tuple[tuple[int, int], ...]
    free: tuple[int, ...]

    @property
    def size(self) -> int:
        return 2 * len(self.pairs) + len(self.free)

    def to_complex(self, features: torch.Tensor) -> torch.Tensor:
        """Map […, head_dim] to […, planes], complex."""
        first = [a for a, _ in self.pairs]
        second = [b for _, b in self.pairs]
        return torch.complex(features[..., first].contiguous(), features[..., second].contiguous())

    def to_dense(self, factors: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
        """Make the real map [size, members * size] of plane factors and a map of free features.

        Args:
            factors: [planes, members] complex: plane f becomes Σ_m factors[f, m] k_m,f.
            free: [len(free), members * len(free)].
        """
        members = factors.shape[1] if self.pairs else free.shape[1] // max(1, len(self.free))
        made = torch.zeros(self.size, members, self.size, dtype=free.dtype, device=free.device)
        for plane, (a, b) in enumerate(self.pairs):
            real, imaginary = factors[plane].real, factors[plane].imag
            made[a, :, a], made[a, :, b] = real, -imaginary
            made[b, :, a], made[b, :, b] = imaginary, real
        if self.free:
            rows = torch.tensor(self.free, device=free.device)
            cut = free.view(len(self.free), members, len(self.free))
            for row, at in enumerate(self.free):
                made[at].index_copy_(1, rows, cut[row])
        return made.flatten(1)


def make_half_split(size: int, rotated: int) -> Planes:
    """Make planes (i, i + rotated/2), as most of transformers has them."""
    half = rotated // 2
    return Planes(tuple((i, i + half) for i in range(half)), tuple(range(rotated, size)))


def make_interleaved(size: int, rotated: int) -> Planes:
    """Make planes (2i, 2i + 1), as GPT-J, Cohere and GLM have them."""
    return Planes(tuple((i, i + 1) for i in range(0, rotated, 2)), tuple(range(rotated, size)))


def find_planes(before: torch.Tensor, after: torch.Tensor, rounding: float = 1e-5) -> Planes | None:
    """Find the layout by which positions turned `before` into `after`; ``None`` if unknown.

    A rotation keeps every plane's length, up to one factor for all (YaRN's attention factor), and
    leaves the rest alone. Told from numbers, since no two architectures write it alike.

    Args:
        before, after: [rows, size], the same key rows at several positions, in fp32.
        rounding: relative, of the arithmetic they came from.
    """
    size = before.shape[1]
    if torch.equal(before, after):
        return Planes((), tuple(range(size)))
    # The fewest first: planes that were left alone would pass as turned by nothing.
    for rotated in range(2, size + 1, 2):
        if not torch.equal(before[:, rotated:], after[:, rotated:]):
            continue
        layouts = make_half_split(size, rotated), make_interleaved(size, rotated)
        distances = [_compute_distance(before, after, layout) for layout in layouts]
        # In half precision the wrong one may come near enough too.
        best = min(range(2), key=distances.__getitem__)
        if distances[best] <= rounding:
            return layouts[best]
    return None


def _compute_distance(before: torch.Tensor, after: torch.Tensor, planes: Planes) -> float:
    """Compute by how much of a plane's length that length changes, in the worst plane."""
    old, new = planes.to_complex(before).abs(), planes.to_complex(after).abs()
    factor = (old * new).sum() / (old * old).sum().clamp_min(1e-30)
    change = (new - factor * old).norm(dim=0) / (factor * old).norm(dim=0).clamp_min(1e-30)
    return float(change.max())
