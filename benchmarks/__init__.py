"""What is claimed, measured: `python -m benchmarks.<name>` from the repository's root."""
