"""Models: their sources, attention sites, configs, meta copies and conversion."""
