"""Measure loss, speed and sizes on the model itself."""

from surgery.measure.measure import Measurement, measure_model

__all__ = ["Measurement", "measure_model"]
