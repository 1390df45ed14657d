"""What the closed-form merge of one attention layer costs: `python -m benchmarks.merge_layer`."""
