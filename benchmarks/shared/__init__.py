"""What grids of cells have in common: models, text, healing, a store and a schedule."""
