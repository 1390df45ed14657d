"""What a run may be told: the typed schema, its checks, and Hydra's hooks."""
