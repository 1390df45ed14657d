"""What each head does: the stage `analyze`."""

from __future__ import annotations

from surgery.pipeline.session import Session


def analyze(session: Session) -> None:
    """Look at every head of the model as it is; write tables and pictures."""
    raise NotImplementedError
