"""Conversion: the same model in another architecture, whose config can say more.

A llama's config says neither a sliding window nor head counts that do not divide its width; a
GPT-2's knows no rotary positions and no grouped keys. Others do, and some of them compute exactly
the same function. This package knows which, and moves the tensors over.
"""

from surgery.models.convert.config import TARGETS, convert_config, list_targets, tensor_map
from surgery.models.convert.model import convert_model
from surgery.models.convert.moves import Move, reverse_move, run_move

__all__ = [
    "TARGETS",
    "Move",
    "convert_config",
    "convert_model",
    "list_targets",
    "reverse_move",
    "run_move",
    "tensor_map",
]
