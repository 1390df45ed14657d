"""Make the decisions that need data, and write them into the plan, which then needs no data."""

from surgery.calibration.calibrate import make_calibrated_plan
from surgery.calibration.case import Calibration

__all__ = ["Calibration", "make_calibrated_plan"]
