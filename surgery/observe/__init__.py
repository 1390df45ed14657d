"""Seeing a running model's attention: the tap, and what is computed at it."""

from surgery.observe.tap import AttentionCall, Tap

__all__ = ["AttentionCall", "Tap"]
