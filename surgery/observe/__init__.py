"""Observe the attention of a running model: the tap, and the statistics computed at it."""

from surgery.observe.tap import AttentionCall, Tap

__all__ = ["AttentionCall", "Tap"]
