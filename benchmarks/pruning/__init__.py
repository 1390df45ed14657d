"""What pruning heads costs and saves: the recipes, their alternatives, and the clock."""
