"""How well each importance estimator says what is lost when heads are pruned: a grid of cells.

`python -m benchmarks.importance`.
"""
