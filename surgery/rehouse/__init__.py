"""Re-housing: the same model in another architecture, whose config can say more.

A llama's config says neither a sliding window nor head counts that do not divide its width; a
GPT-2's knows no rotary positions and no grouped keys. Others do, and some of them compute exactly
the same function. This package knows which, moves the tensors over and checks the result.
"""

from surgery.rehouse.check import check_rehoused
from surgery.rehouse.config import TARGETS, houses, rehouse_config, tensor_map
from surgery.rehouse.model import rehouse
from surgery.rehouse.moves import Move, reverse_move, run_move

__all__ = [
    "TARGETS",
    "Move",
    "check_rehoused",
    "houses",
    "rehouse",
    "rehouse_config",
    "reverse_move",
    "run_move",
    "tensor_map",
]
