"""The W&B workspace, as code."""
