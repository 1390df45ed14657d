"""Find out what each head does: roles, probes, similarity, maps. The model is not changed."""

from surgery.lab.analysis.roles import ROLES, Thresholds
from surgery.lab.analysis.watch import find_self_attention

__all__ = ["ROLES", "Thresholds", "find_self_attention"]
