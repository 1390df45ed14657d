"""The plan: operations resolved into ordered edits, before any weight is read."""
