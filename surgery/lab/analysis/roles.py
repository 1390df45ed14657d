"""Name what a head does, by its scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# The first role whose score passes names the head. Roles that need something to copy come first,
# since these heads look at other tokens most of the time. Then come the roles that say most about
# where a head looks, and last those of heads that look at nothing special.
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
    """The score that each role needs.

    Attributes:
        induction: mean attention to the token after the first copy of the same token, on repeated
            random tokens (prefix matching, Olsson et al. 2022, arXiv:2209.11895).
        duplicate_token: mean attention to the first copy itself (Wang et al. 2022,
            arXiv:2211.00593).
        previous_token: mean attention to the token before. Clark et al. 2019 (arXiv:1906.04341,
            section 3.1) name heads with more than half of it there. The two above have the same
            threshold, since their papers give scores but no threshold.
        positional: fraction of rows whose highest weight lies at one offset; 0.9 in Voita et al.
            2019 (arXiv:1905.09418, section 5.1).
        syntactic: accuracy of the best relation above the best fixed offset; 0.1 in Voita et al.
            2019 (section 5.2).
        first_token: mean attention to the first token, the sink of Xiao et al. 2023
            (arXiv:2309.17453); 0.3 in Gu et al. 2024 (arXiv:2410.10781).
        broadcast: mean entropy relative to the highest possible one. Clark et al. 2019 (section
            3.3) find heads near uniform but give no number; this threshold is ours.
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


def choose_role(scores: Mapping[str, float | None], thresholds: Thresholds) -> str:
    """Choose the first of `ROLES` whose score reaches its threshold; ``mixed`` if none does.

    Args:
        scores: role → score; a score that is ``None`` or missing was not measured.
    """
    for role in ROLES:
        score = scores.get(role)
        if score is not None and score >= getattr(thresholds, role):
            return role
    return MIXED
