"""Layouts of rotated features, told from numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.operations.gqa.planes import Planes, find_planes, make_half_split, make_interleaved
from tests.operations.gqa.drawing import F64, rotations

EPS = torch.finfo(torch.float32).eps


def turned(layout: Planes, factor: float = 1.0, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Rows before and after positions 0, 1, 2… turned them."""
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(20, layout.size, generator=generator, dtype=F64)
    speeds = 100.0 ** -torch.linspace(0, 1, max(1, len(layout.pairs)), dtype=F64)
    angles = torch.arange(20.0, dtype=F64)[:, None] * speeds[: len(layout.pairs)]
    after = (rotations(layout, angles) @ before[..., None])[..., 0]
    for pair in layout.pairs:
        after[:, list(pair)] *= factor
    return before.float(), after.float()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from([make_half_split, make_interleaved]),
    st.integers(0, 5),
    st.integers(0, 5),
    st.sampled_from([1.0, 1.2, 0.7]),
    st.integers(0, 99),
)
def test_layouts_are_recognised(
    kind: object, planes: int, free: int, factor: float, seed: int
) -> None:
    if planes + free == 0:
        return
    layout = kind(2 * planes + free, 2 * planes)  # type: ignore[operator]
    before, after = turned(layout, factor, seed)
    # The unrotated features are left alone to the bit.
    after[:, 2 * planes :] = before[:, 2 * planes :]
    assert find_planes(before, after, 16 * EPS) == layout


def test_two_features_are_one_plane_either_way() -> None:
    assert make_half_split(4, 2) == make_interleaved(4, 2)


@pytest.mark.parametrize("what", ["noise", "scaled", "mixed", "one plane stretched", "shifted"])
def test_what_is_no_rotation_is_not_taken_for_one(what: str) -> None:
    layout = make_half_split(8, 8)
    before, after = turned(layout)
    if what == "noise":
        after = torch.randn(after.shape, generator=torch.Generator().manual_seed(1))
    elif what == "scaled":
        after = after * torch.linspace(0.5, 1.5, 20)[:, None]  # token by token, as a norm does
    elif what == "mixed":
        after = after @ torch.linalg.qr(torch.randn(8, 8)).Q
    elif what == "one plane stretched":
        after[:, 3], after[:, 7] = 1.01 * after[:, 3], 1.01 * after[:, 7]
    else:
        after = after + 0.1
    assert find_planes(before, after, 16 * EPS) is None


@pytest.mark.parametrize("kind", [make_half_split, make_interleaved])
def test_half_precision_tells_them_apart_too(kind: object) -> None:
    layout = kind(16, 16)  # type: ignore[operator]
    before, after = turned(layout)
    before = before.bfloat16().float()
    after = after.bfloat16().float()
    assert find_planes(before, after, 16 * torch.finfo(torch.bfloat16).eps) == layout


def test_dense_maps_do_what_their_complex_factors_say() -> None:
    layout = make_interleaved(7, 4)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 2, 7, generator=generator, dtype=F64)
    factors = torch.randn(2, 2, generator=generator, dtype=torch.complex128)
    free = torch.randn(3, 6, generator=generator, dtype=F64)
    made = features.flatten(1) @ layout.to_dense(factors, free).mT
    expected = torch.einsum("fm,tmf->tf", factors, layout.to_complex(features))
    torch.testing.assert_close(layout.to_complex(made), expected)
    torch.testing.assert_close(made[:, 4:], features[..., 4:].flatten(1) @ free.mT)
    assert layout.size == 7
