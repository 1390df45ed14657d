"""What each way to merge KV heads costs, and what healing brings back: a grid of cells.

`python -m benchmarks.merge_quality`.
"""
