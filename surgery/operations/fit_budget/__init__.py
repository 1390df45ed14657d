"""`fit_budget`: the best attention under a budget, each layer by itself.

operation   the options, and what takes its place
target      what the model may cost, and what each choice does
search      scores, picks, measures, and scores again
programme   the choice that loses least within the target
"""

from surgery.operations.fit_budget.operation import FitBudget

__all__ = ["FitBudget"]
