"""Several tasks and one model: which heads each needs, where they disagree, three ways out.

projections = OutputProjections(model)
projections.add("code", "projections/code.safetensors")
projections.use("code")
"""

from surgery.lab.tasks.combine import combined
from surgery.lab.tasks.projections import OutputProjections

__all__ = ["OutputProjections", "combined"]
