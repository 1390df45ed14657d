"""The plan: operations and anatomy, resolved into ordered edits before any weight is read."""
