"""Several tasks and one model: which heads each task needs, and what to do if they disagree.

projections = OutputProjections(model)
projections.add("code", "projections/code.safetensors")
projections.use("code")
"""

from surgery.lab.tasks.combine import combine_scores
from surgery.lab.tasks.projections import OutputProjections

__all__ = ["OutputProjections", "combine_scores"]
