"""Lightning callbacks that observe heads. They never change the model."""

from .attention_statistics import AttentionStatistics
from .head_alarms import HeadAlarms
from .head_importance import HeadImportance
from .head_table import HeadTable

__all__ = ["AttentionStatistics", "HeadAlarms", "HeadImportance", "HeadTable"]
