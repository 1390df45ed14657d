"""Leave-one-out, work shared or not: `python -m benchmarks.leave_one_out`."""
