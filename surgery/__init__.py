"""Attention surgery, declared: plan, operate, watch, heal, export.

The names below are the public API; docs/own-training-loop.md shows them at work.
"""

from surgery.anatomy import Anatomy, Site, find_sites
from surgery.errors import ConfigError, PlanError, SurgeryError, TapError
from surgery.execute.live import apply_
from surgery.observation import AttentionCall, Tap
from surgery.operations import parse_operations
from surgery.plan.make import make_plan
from surgery.plan.plan import Plan

__all__ = [
    "Anatomy",
    "AttentionCall",
    "ConfigError",
    "Plan",
    "PlanError",
    "Site",
    "SurgeryError",
    "Tap",
    "TapError",
    "apply_",
    "find_sites",
    "make_plan",
    "parse_operations",
]
