"""Measure which heads matter: estimators with one interface, and the score table they fill.

table = score_heads(model, batches, "leave_one_out")
table.save("importance.json")
"""

from surgery.importance.estimate import score_heads
from surgery.importance.gates import Gates
from surgery.importance.table import ScoreTable, SiteScores

__all__ = ["Gates", "ScoreTable", "SiteScores", "score_heads"]
