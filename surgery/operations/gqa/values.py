"""Values of a group become one: the subspace that the output projections read most of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from surgery.operations.gqa.subspace import NOISE, find_shared_subspace, solve_readers


@dataclass(frozen=True)
class SharedValues:
    """The value that a group of KV heads shares, and the output projection that reads it.

    Attributes:
        value: [D, members * D]: the shared value from the members' values, stacked.
        output: per query head [D_model, D]: its new slice of the output projection.
        loss: E|output error|² over the group's heads, as a share of E|output|², both under the
            noise that the values were found under.
    """

    value: torch.Tensor
    output: dict[int, torch.Tensor]
    loss: float


def share_values(
    attended: Mapping[int, torch.Tensor],
    outputs: Mapping[int, torch.Tensor],
    member_of: Mapping[int, int],
    members: int,
    noise: float = NOISE,
) -> SharedValues:
    """Find the values that lose least when a group shares them.

    Minimises Σ_h E|O_h V_m(h) z_h - O'_h V z_h|² over V and every O'_h, with z_h the inputs as
    head h attends to them: `find_shared_subspace` in the span of the members' values.

    Args:
        attended: query head → [members * D, members * D], second moments of the members' values,
            side by side, as this head attends to them.
        outputs: query head → [D_model, D], its slice of the output projection.
        member_of: query head → place of its own KV head in the group.
        noise: of `find_shared_subspace`.
    """
    heads = sorted(attended)
    width = outputs[heads[0]].shape[1]
    covariances = [attended[head] for head in heads]
    eye = torch.eye(members * width, dtype=covariances[0].dtype, device=covariances[0].device)
    own = [eye[member_of[head] * width :][:width] for head in heads]
    # Of an output projection only O^T O counts: its triangular factor stands for it.
    halves = [torch.linalg.qr(outputs[head], mode="r").R for head in heads]
    targets = [half @ pick for half, pick in zip(halves, own, strict=True)]
    shared, _, loss = find_shared_subspace(covariances, targets, width, noise=noise)
    scale = _compute_scale(shared, covariances, width)
    found = solve_readers(shared, covariances, own)
    made = {head: outputs[head] @ one / scale for head, one in zip(heads, found, strict=True)}
    return SharedValues(shared * scale, made, loss)


def _compute_scale(
    shared: torch.Tensor, covariances: Sequence[torch.Tensor], width: int
) -> torch.Tensor:
    """Compute what makes shared values as large as the members' were, on average."""
    mean = sum(covariances, torch.zeros_like(covariances[0])) / len(covariances)
    members = mean.diagonal().sum() / (len(mean) / width)
    made = torch.einsum("ij,jk,ik->", shared, mean, shared)
    return (members / made.clamp_min(1e-30)).sqrt().clamp_min(1e-30)
