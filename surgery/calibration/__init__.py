"""Decisions that need data, resolved into a plan: after it the plan is closed and needs none."""

from surgery.calibration.calibrate import calibrated_plan
from surgery.calibration.options import Calibration

__all__ = ["Calibration", "calibrated_plan"]
