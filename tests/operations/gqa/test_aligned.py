"""Procrustes turns and renormalisation, against what they are defined by."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from surgery.operations.gqa.aligned import align_keys, compute_renorm_factor, solve_procrustes
from surgery.operations.gqa.planes import make_half_split
from tests.operations.gqa.drawing import F64, Drawn, drawn, features, moments_of


def spread(samples: Tensor, turns: list[Tensor]) -> float:
    """How far turned members lie from their mean, [T, members, n]."""
    turned = torch.stack([samples[:, m] @ turn.mT for m, turn in enumerate(turns)], dim=1)
    return float((turned - turned.mean(1, keepdim=True)).pow(2).sum())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 12), st.integers(0, 99))
def test_turns_are_orthogonal_and_bring_members_together(
    members: int, size: int, rank: int, seed: int
) -> None:
    samples = features(members, size, rank, seed)
    stacked = samples.flatten(1)
    turns = solve_procrustes(stacked.mT @ stacked / len(samples), members)
    eye = torch.eye(size, dtype=F64)
    for turn in turns:
        torch.testing.assert_close(turn @ turn.mT, eye, rtol=0, atol=1e-9)
    assert spread(samples, turns) <= spread(samples, [eye] * members) * (1 + 1e-9) + 1e-9


def test_members_that_are_turned_copies_meet_exactly() -> None:
    base = features(1, 4, 6, 0)[:, 0]
    generator = torch.Generator().manual_seed(1)
    hidden = torch.linalg.qr(torch.randn(3, 4, 4, generator=generator, dtype=F64)).Q
    samples = torch.stack([base @ turn.mT for turn in hidden], dim=1)
    stacked = samples.flatten(1)
    turns = solve_procrustes(stacked.mT @ stacked, 3)
    assert spread(samples, turns) < 1e-18 * float(samples.pow(2).sum()) + 1e-12


@settings(max_examples=40, deadline=None, derandomize=True)
@given(drawn())
def test_keys_come_nearer_to_their_mean(case: Drawn) -> None:
    group, size = list(range(case.keys.shape[1])), case.layout.size
    found = align_keys(case.moments, group)
    turns = [len(group) * block for block in found.key.split(size, dim=1)]
    centred = case.keys.clone()
    free = list(case.layout.free)
    centred[..., free] -= centred[..., free].mean(0)
    before = spread(centred, [torch.eye(size, dtype=F64)] * len(group))
    assert spread(centred, turns) <= before * (1 + 1e-6) + 1e-9
    for turn, query in zip(turns, found.query, strict=True):
        torch.testing.assert_close(turn, query, rtol=0, atol=1e-9)  # q and k turn together


def test_a_plane_is_turned_by_the_angle_between_its_members() -> None:
    layout = make_half_split(4, 4)
    one = features(1, 4, 4, 0)
    two = one.clone()
    angle = torch.tensor([0.5, -1.2], dtype=F64)
    z = layout.to_complex(one) * torch.polar(torch.ones(2, dtype=F64), angle)
    two[..., :2], two[..., 2:] = z.real, z.imag
    keys = torch.cat([one, two], dim=1)
    found = align_keys(moments_of(layout, keys, keys), [0, 1])
    turned = [keys[:, m] @ found.query[m].mT for m in (0, 1)]
    torch.testing.assert_close(turned[0], turned[1], rtol=0, atol=1e-9)


def test_renormalising_restores_the_mean_size() -> None:
    generator = torch.Generator().manual_seed(0)
    sources = list(torch.randn(4, 3, 5, generator=generator))
    pooled = torch.stack(sources).mean(0)
    factor = compute_renorm_factor(pooled, sources)
    expected = torch.stack([source.norm() for source in sources]).mean()
    torch.testing.assert_close((pooled * factor).norm(), expected)
    assert compute_renorm_factor(torch.zeros(3, 5), sources).isfinite()
