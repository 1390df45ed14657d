"""Text to batches: sources, the held-out split, windows, and a resumable data module."""
