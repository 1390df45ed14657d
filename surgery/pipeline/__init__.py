"""One run: stages that hand each other a session, in a fixed order."""
