"""Carrying out a plan. The arithmetic is in `surgery.transforms`; here it meets a model."""
