"""A name for what a head does, and the score behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# In the order in which they are asked: the first that passes names the head. What shows only where
# there is something to copy comes first, since such heads rest on other tokens most of the time;
# then what says most about where a head looks; last, where it looks when it looks nowhere.
ROLES = (
    "induction",
    "duplicate_token",
    "previous_token",
    "positional",
    "syntactic",
    "first_token",
    "broadcast",
)
MIXED = "mixed"


@dataclass(frozen=True)
class Thresholds:
    """What a score must reach.

    Attributes:
        induction: mean attention to the token after the same token's first occurrence, on random
            tokens said twice (prefix matching, Olsson et al. 2022, arXiv:2209.11895).
        duplicate_token: mean attention to the first occurrence itself (Wang et al. 2022,
            arXiv:2211.00593).
        previous_token: mean attention to the token before; Clark et al. 2019 (arXiv:1906.04341,
            section 3.1) speak of heads with more than half of it there. The two above are held to
            the same measure, since their papers give scores and no threshold.
        positional: share of rows whose highest weight lies at one offset; 0.9 in Voita et al. 2019
            (arXiv:1905.09418, section 5.1).
        syntactic: accuracy above the best fixed offset, of the best relation; 0.1 in Voita et al.
            2019 (section 5.2).
        first_token: mean attention to the first token, the sink of Xiao et al. 2023
            (arXiv:2309.17453); 0.3 in Gu et al. 2024 (arXiv:2410.10781).
        broadcast: mean entropy as a share of the highest it could be. Clark et al. 2019 (section
            3.3) find heads near uniform and state no number; this one is ours.
    """

    induction: float = 0.5
    duplicate_token: float = 0.5
    previous_token: float = 0.5
    positional: float = 0.9
    syntactic: float = 0.1
    first_token: float = 0.3
    broadcast: float = 0.9

    def to_json(self) -> dict[str, float]:
        return {role: getattr(self, role) for role in ROLES}


def role_of(scores: Mapping[str, float | None], thresholds: Thresholds) -> str:
    """The first of `ROLES` whose score reaches its threshold; ``mixed`` where none does.

    Args:
        scores: role → score; ``None``, or a role that is missing: not measured.
    """
    for role in ROLES:
        score = scores.get(role)
        if score is not None and score >= getattr(thresholds, role):
            return role
    return MIXED
