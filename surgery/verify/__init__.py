"""Everything that runs a forward pass to check a plan or a result."""
