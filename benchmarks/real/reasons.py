"""Why a result is not what was hoped for: by the name of a target, or of a row. For the page."""

from __future__ import annotations

REASONS: dict[str, str] = {}
