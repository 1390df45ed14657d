"""The paper ladder, climbed with this project's own operations: `python -m benchmarks.ladder`."""
