"""`prune_heads`: heads physically removed, those named or those with the lowest scores.

operation  the options, and what they mean for a plan
options    which of them cannot be together
resolve    calibration: scores of heads, and the refit of what is left
refit      output projections solved anew
removal    a block whose heads are all gone
schedule, gating, closing, cut    heads that close while a model trains
"""

from surgery.operations.prune_heads.operation import PruneHeads

__all__ = ["PruneHeads"]
