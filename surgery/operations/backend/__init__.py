"""`backend`: which code computes attention, compared with eager on the first batch."""

from surgery.operations.backend.operation import Backend

__all__ = ["Backend"]
