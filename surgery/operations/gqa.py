"""`gqa`: fewer KV heads, each shared by a group of query heads (arXiv:2305.13245)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from surgery.anatomy import Site
from surgery.errors import ConfigError
from surgery.operations.base import operation
from surgery.operations.layers import chosen
from surgery.plan.head_edits import Merging, Parts, regroup, unchanged
from surgery.plan.operation import Draft, Operation

_COUNTS = "a whole number, or a list with one number per layer"


class Merge(Enum):
    """How the KV heads of a group become one (Ainslie et al. 2023, section 3.3)."""

    mean = "mean"
    first = "first"
    random = "random"


@operation("gqa")
@dataclass
class GQA(Operation):
    """Options of `attention.gqa`.

    Attributes:
        kv_heads: KV heads per site afterwards, a divisor of what it has; 1 is MQA. A list has one
            number per chosen layer.
        merge: mean of the group's heads, the first of them, or a fresh random head.
        layers: sites to change, by number from 0; ``None`` for all.
    """

    kv_heads: Any = field(default=MISSING, metadata={"valid": _COUNTS})
    merge: Merge = Merge.mean
    layers: list[int] | None = None

    def __post_init__(self) -> None:
        given = self.kv_heads
        counts = given if isinstance(given, (list, tuple)) and given else [given]
        if not all(type(count) is int for count in counts):
            raise ConfigError(
                self.key("kv_heads"), "is no number of heads", given=repr(given), valid=_COUNTS
            )

    def plan(self, draft: Draft) -> None:
        sites = chosen(draft.sites, self.layers, self.key("layers"), draft.removed)
        counts = self._counts(sites)
        for site, count in zip(sites, counts, strict=True):
            self._check(site, count)
        merging = Merging(
            self.merge.value, str(draft.context.seed), draft.context.initializer_range
        )
        for site, count in zip(sites, counts, strict=True):
            if site.kv_heads != count:
                draft.change(
                    [regroup(site, self.name, unchanged(site.q_heads), runs(site.kv_heads, count),
                             merging)]
                )  # fmt: skip

    def _counts(self, sites: Sequence[Site]) -> list[int]:
        given = self.kv_heads
        if isinstance(given, int):
            return [given] * len(sites)
        if len(given) != len(sites):
            raise ConfigError(
                self.key("kv_heads"), f"has {len(given)} numbers for {len(sites)} layers",
                given=list(given), valid=_COUNTS,
            )  # fmt: skip
        return list(given)

    def _check(self, site: Site, count: int) -> None:
        key = self.key("kv_heads")
        divisors = [n for n in range(1, site.kv_heads + 1) if site.kv_heads % n == 0]
        if count > site.kv_heads:
            raise ConfigError(
                key, f"more than the {site.kv_heads} KV heads of {site.path}",
                given=count, valid=divisors,
            )  # fmt: skip
        if count not in divisors:
            raise ConfigError(
                key, f"does not divide the {site.kv_heads} KV heads of {site.path}",
                given=count, valid=divisors,
            )  # fmt: skip


def runs(heads: int, groups: int) -> Parts:
    """`groups` runs of neighbouring heads."""
    size = heads // groups
    return tuple(tuple(range(start, start + size)) for start in range(0, heads, size))
