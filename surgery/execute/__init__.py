"""Carrying out a plan. The arithmetic is in `transforms`; here it meets a model."""
