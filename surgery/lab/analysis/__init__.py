"""What each head does: roles, probes, similarity, maps. Nothing is trained, nothing changed."""

from surgery.lab.analysis.roles import ROLES, Thresholds
from surgery.lab.analysis.watch import self_attention

__all__ = ["ROLES", "Thresholds", "self_attention"]
