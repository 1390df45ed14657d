"""How much text a calibration asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence

from surgery.models.sites import Site

# An output projection is solved from this many tokens for each unknown of one of its outputs.
TOKENS_PER_UNKNOWN = 64
LEAST_WINDOWS = 64


def count_unknowns(sites: Sequence[Site]) -> int:
    """Count the unknowns of one output of the widest output projection, its bias included."""
    return 1 + max((site.q_heads * site.output.unit for site in sites), default=0)


def count_windows(given: int | None, sites: Sequence[Site], seq_len: int) -> int:
    """Count the windows that a calibration looks at: the given number, or what the widths need."""
    if given is not None:
        return given
    tokens = TOKENS_PER_UNKNOWN * count_unknowns(sites)
    return max(LEAST_WINDOWS, math.ceil(tokens / seq_len))
