"""Where a model comes from: the embedded one, a directory, the hub, or random weights."""
