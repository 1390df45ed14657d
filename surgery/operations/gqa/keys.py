"""Keys of a group become one: principal components of what the queries weigh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from surgery.operations.gqa.planes import Planes
from surgery.operations.gqa.subspace import find_top_subspace, solve_readers


@dataclass
class KeyMoments:
    """Second moments of one site's keys and queries, before positions turn them.

    Attributes:
        planes: [P, Hkv, Hkv] complex: E[k k^H] of every rotated plane.
        power: [P, Hkv]: E|q|² of it, summed over the query heads of each KV head.
        free: [Hkv * F, Hkv * F]: covariance of the unrotated features, head by head. The mean is
            left out: a constant in all keys of a query changes no softmax.
        metric: [Hkv, F, F]: E[q q^T] on them, summed over the query heads of each KV head.
    """

    layout: Planes
    planes: torch.Tensor
    power: torch.Tensor
    free: torch.Tensor
    metric: torch.Tensor

    def compute_total(self) -> float:
        """Compute E|logit|² of all heads, up to the one scaling: the whole of a loss.

        A plane's part of a logit is Re(q conj(k) e^iθ), with any phase: on average its square is
        half of |q|²|k|².
        """
        turned = torch.einsum("ph,phh->", self.power.to(self.planes.dtype), self.planes).real
        width = len(self.layout.free)
        rest = 0.0
        for head in range(len(self.metric)):
            block = slice(head * width, (head + 1) * width)
            rest += float((self.metric[head] * self.free[block, block].mT).sum())
        return float(turned) / 2 + rest


@dataclass(frozen=True)
class SharedKeys:
    """The key that a group of KV heads shares, and what its queries become.

    Attributes:
        key: [D, members * D]: the shared key from the members' keys, stacked.
        query: per member [D, D]: what a query of that member becomes.
        loss: E|logit error|² over the group's heads, in units of `KeyMoments.compute_total`.
    """

    key: torch.Tensor
    query: list[torch.Tensor]
    loss: float


def share_keys(moments: KeyMoments, group: Sequence[int]) -> SharedKeys:
    """Find the keys that lose least when `group` shares them (closed form).

    Per rotated plane: κ = u^H S k for the top eigenvector u of S E[k k^H] S, S² the power of the
    members' queries; each query takes the conjugate of its regression factor of k on κ. That
    commutes with RoPE. Free features: the top subspace in the metrics of queries and keys.
    """
    layout, members = moments.layout, list(group)
    factors, answers, loss = _share_planes(moments, members)
    shared, free_answers, free_loss = _share_free_features(moments, members)
    width = len(layout.free)
    queries = []
    for number in range(len(members)):
        conjugate = answers[:, number : number + 1].conj()
        # q' = R^T q where k ≈ R κ.
        queries.append(layout.to_dense(conjugate, free_answers[number].mT.reshape(width, width)))
    return SharedKeys(layout.to_dense(factors, shared), queries, loss + free_loss)


def compute_group_loss(moments: KeyMoments, group: Sequence[int]) -> float:
    """Compute `share_keys(moments, group).loss` without making the keys."""
    members = list(group)
    return _compute_plane_loss(moments, members) + _share_free_features(moments, members)[2]


def _weigh_planes(moments: KeyMoments, members: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    gram = moments.planes[:, members][:, :, members]
    roots = moments.power[:, members].sqrt().to(gram.dtype)
    return gram, roots[:, :, None] * gram * roots[:, None, :]


def _compute_plane_loss(moments: KeyMoments, members: list[int]) -> float:
    if not moments.layout.pairs:
        return 0.0
    values = torch.linalg.eigvalsh(_weigh_planes(moments, members)[1])
    return float(values[:, :-1].clamp_min(0).sum()) / 2


def _share_planes(
    moments: KeyMoments, members: list[int]
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Find per plane and member its factor in κ, and the regression of its key on κ."""
    if not moments.layout.pairs:
        nothing = moments.planes.new_zeros(0, len(members))
        return nothing, nothing, 0.0
    gram, weighted = _weigh_planes(moments, members)
    values, vectors = torch.linalg.eigh(weighted)
    roots = moments.power[:, members].sqrt().clamp_min(1e-30)
    factors = vectors[..., -1].conj() * roots
    across = torch.einsum("phg,pg->ph", gram, factors.conj())  # E[k conj κ]
    size = torch.einsum("ph,ph->p", factors, across).real.clamp_min(1e-30)
    answers = across / size[:, None]
    # κ as large as the members' keys are, so that queries keep their size.
    scale = answers.abs().pow(2).mean(1, keepdim=True).sqrt().clamp_min(1e-30)
    loss = float(values[:, :-1].clamp_min(0).sum()) / 2
    return factors * scale, answers / scale, loss


def _share_free_features(
    moments: KeyMoments, members: list[int]
) -> tuple[torch.Tensor, list[torch.Tensor], float]:
    width = len(moments.layout.free)
    if not width:
        nothing = moments.free.new_zeros(0, 0)
        return nothing, [nothing] * len(members), 0.0
    rows = torch.cat([torch.arange(m * width, (m + 1) * width) for m in members])
    covariance = moments.free[rows][:, rows]
    weight = torch.block_diag(*(moments.metric[m] for m in members))
    shared = find_top_subspace(weight, covariance, width)
    targets = list(torch.eye(len(rows), dtype=shared.dtype).split(width))
    targets = [target.to(shared.device) for target in targets]
    found = solve_readers(shared, [covariance] * len(members), targets)
    scale = torch.stack(found).pow(2).sum((1, 2)).mean().div(width).sqrt().clamp_min(1e-30)
    loss = 0.0
    for member, reader, target in zip(members, found, targets, strict=True):
        left = target - reader @ shared
        loss += float((moments.metric[member] * (left @ covariance @ left.mT)).sum())
    return shared * scale, [reader / scale for reader in found], loss
