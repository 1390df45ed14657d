"""What each head does: roles, probes, similarity, maps. Nothing is trained, nothing changed."""

from surgery.analysis.roles import ROLES, Thresholds
from surgery.analysis.watch import self_attention

__all__ = ["ROLES", "Thresholds", "self_attention"]
