"""What a run says of itself: the table, the summary, the model card."""
