"""Convert a model to another architecture with the same function, whose config can express more.

The config of a llama has no sliding window, and no head counts that do not divide its width. The
config of a GPT-2 has no rotary positions and no KV groups. Other architectures have these options,
and some of them compute exactly the same function. This package knows which ones, and where the
tensors go.
"""

from surgery.models.convert.config import TARGETS, convert_config, list_targets, map_tensors
from surgery.models.convert.model import convert_model
from surgery.models.convert.moves import Move, reverse_move, run_move

__all__ = [
    "TARGETS",
    "Move",
    "convert_config",
    "convert_model",
    "list_targets",
    "map_tensors",
    "reverse_move",
    "run_move",
]
