"""`rope`: other rotary positions, for a longer context or for none (arXiv:2104.09864)."""

from surgery.operations.rope.operation import Rope

__all__ = ["Rope"]
