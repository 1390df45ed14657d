"""Perform a plan on a model. The arithmetic is in `surgery.transforms`."""
