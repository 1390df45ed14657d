"""What each head does: roles, probes, similarity, maps."""
