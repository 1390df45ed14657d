"""Lightning callbacks that watch heads. They never change the model."""

from .attention_entropy import AttentionEntropy
from .head_importance import HeadImportance
from .head_table import HeadTable

__all__ = ["AttentionEntropy", "HeadImportance", "HeadTable"]
