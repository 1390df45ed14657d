"""Attention surgery, declared: plan, operate, watch, heal, export.

The names below are the public API; docs/own-training-loop.md shows them at work. They are imported
when first used, so that `import surgery.hydra` in front of an app costs it neither torch nor
transformers. Importing it also lets transformers' `from_pretrained` read this project's records.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from surgery.checkout import use_own_folders
from surgery.record.register import register_when_needed

if TYPE_CHECKING:
    from surgery.calibration import Calibration, make_calibrated_plan
    from surgery.config.options import Range, option
    from surgery.errors import ConfigError, PlanError, SurgeryError, TapError
    from surgery.execute.live import apply_
    from surgery.importance import ScoreTable, score_heads
    from surgery.models.sites import Anatomy, Site, find_sites
    from surgery.observe import AttentionCall, Tap
    from surgery.operations.fuse_qkv.projections import unfuse_qkv_
    from surgery.plan.draft import Draft
    from surgery.plan.layers import select_sites
    from surgery.plan.make import make_plan
    from surgery.plan.operation import Operation
    from surgery.plan.plan import Plan
    from surgery.plan.registry import parse_operations
    from surgery.plan.store import load_plan, save_plan

_HOMES = {
    "Anatomy": "surgery.models.sites",
    "AttentionCall": "surgery.observe",
    "Calibration": "surgery.calibration",
    "ConfigError": "surgery.errors",
    "Draft": "surgery.plan.draft",
    "Operation": "surgery.plan.operation",
    "Plan": "surgery.plan.plan",
    "PlanError": "surgery.errors",
    "Range": "surgery.config.options",
    "ScoreTable": "surgery.importance",
    "Site": "surgery.models.sites",
    "SurgeryError": "surgery.errors",
    "Tap": "surgery.observe",
    "TapError": "surgery.errors",
    "apply_": "surgery.execute.live",
    "find_sites": "surgery.models.sites",
    "load_plan": "surgery.plan.store",
    "make_calibrated_plan": "surgery.calibration",
    "make_plan": "surgery.plan.make",
    "option": "surgery.config.options",
    "parse_operations": "surgery.plan.registry",
    "save_plan": "surgery.plan.store",
    "score_heads": "surgery.importance",
    "select_sites": "surgery.plan.layers",
    "unfuse_qkv_": "surgery.operations.fuse_qkv.projections",
}

__all__ = [
    "Anatomy",
    "AttentionCall",
    "Calibration",
    "ConfigError",
    "Draft",
    "Operation",
    "Plan",
    "PlanError",
    "Range",
    "ScoreTable",
    "Site",
    "SurgeryError",
    "Tap",
    "TapError",
    "apply_",
    "find_sites",
    "load_plan",
    "make_calibrated_plan",
    "make_plan",
    "option",
    "parse_operations",
    "save_plan",
    "score_heads",
    "select_sites",
    "unfuse_qkv_",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'surgery' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


use_own_folders()
register_when_needed()
