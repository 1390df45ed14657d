"""Per-head statistics from whole attention maps, as tools that have no other way take them."""

from __future__ import annotations

import torch

# As `surgery.observe` defines them. The largest logit and the norm of a head's output are not
# to be had from a map.
NAMES = (
    "attention_entropy",
    "normalized_entropy",
    "saturation",
    "confidence",
    "first_token",
    "previous_token",
    "own_token",
    "same_token",
    "induction",
    "distance",
)
_SATURATED = 0.99


@torch.no_grad()
def statistics(weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Means over rows [len(NAMES), H] of one layer's causal map [1, H, N, N]; NaN: no such row.

    One head after the other, so that what is computed takes little beside the map itself.
    """
    places = torch.arange(ids.shape[1])
    equal = (ids[0][:, None] == ids[0][None, :]) & (places[None, :] < places[:, None])
    # Keys right after an earlier one of the query's own token.
    follows = torch.zeros_like(equal)
    follows[:, 1:] = equal[:, :-1]
    follows.fill_diagonal_(False)
    found = torch.empty(len(NAMES), weights.shape[1])
    for head in range(weights.shape[1]):
        found[:, head] = _of_head(weights[0, head].float(), places, equal, follows)
    return found


def _of_head(
    weights: torch.Tensor, places: torch.Tensor, equal: torch.Tensor, follows: torch.Tensor
) -> torch.Tensor:
    entropy = torch.special.entr(weights).sum(-1)
    # The first row sees one key alone: it has no choice.
    rows, reach = weights[1:], places.to(weights.dtype)
    largest = rows.amax(-1)
    return torch.stack(
        [
            entropy.mean(),
            (entropy[1:] / (reach[1:] + 1).log()).mean(),
            (largest > _SATURATED).float().mean(),
            largest.mean(),
            rows[:, 0].mean(),
            weights.diagonal(-1).mean(),
            weights.diagonal()[1:].mean(),
            _mass(weights, equal),
            _mass(weights, follows),
            (reach[1:] - rows @ reach).mean(),
        ]
    )


def _mass(weights: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Of the rows that have what is wanted."""
    return (weights * wanted).sum(-1)[wanted.any(-1)].mean()
