"""`random`: uniform numbers, the control that every estimator has to beat."""

from __future__ import annotations

import zlib

import torch

from surgery.importance.table import HEADS
from surgery.importance.work import Scores, Work


def random_scores(work: Work) -> Scores:
    """Uniform in [0, 1), from the seed and each site's path alone; heads and groups apart.

    Where a group is one head the two are the same numbers.
    """
    scores: Scores = {}
    for unit in work.units:
        scores[unit] = []
        for site in work.sites:
            name = HEADS if site.group_size == 1 else unit
            drawn = zlib.crc32(f"{work.seed}/{site.path}/{name}".encode())
            generator = torch.Generator().manual_seed(drawn)
            count = site.q_heads if name == HEADS else site.kv_heads
            scores[unit].append(torch.rand(count, generator=generator, dtype=torch.float64))
    return scores
