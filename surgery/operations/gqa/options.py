"""The options of `gqa`, and the counts and groups of KV heads that they mean."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from surgery.config.options import option
from surgery.errors import ConfigError
from surgery.models.sites import Site
from surgery.plan.layers import LAYERS_HELP
from surgery.plan.operation import Operation
from surgery.plan.resolution import Parts

_COUNTS = "a whole number, a list with one number per layer, or {average: number}"
AVERAGE = "average"
_GROUPS = "{layer: [[KV heads of one group], …]}"


class Merge(Enum):
    """How the KV heads of a group become one.

    mean, first, random: Ainslie et al. 2023, section 3.3. aligned, aligned_renorm: turned towards
    each other first (arXiv:2412.20677). optimal: the shared keys and values that lose least.
    """

    mean = "mean"
    first = "first"
    random = "random"
    aligned = "aligned"
    aligned_renorm = "aligned_renorm"
    optimal = "optimal"


class Grouping(Enum):
    """Which KV heads share: neighbours, or those that lose least by it."""

    contiguous = "contiguous"
    similarity = "similarity"


_REWRITING = (Merge.aligned, Merge.aligned_renorm, Merge.optimal)


@dataclass
class GQAOptions(Operation):
    """Options of `attention.gqa`.

    Attributes:
        kv_heads: KV heads per site afterwards, a divisor of what it has; 1 is MQA. A multiple
            repeats them, up to one for each query head. A list has one number per chosen layer.
            ``{average: n}``: as many on average, chosen where fewer hurt least; as many everywhere
            where the export must be native.
        merge: see `Merge`; those after random are calibrated.
        grouping: see `Grouping`; similarity is calibrated.
        layers: sites to change, by number from 0; ``None`` for all.
        groups: layer → groups of KV heads that share, in place of `grouping` there; or a file of
            them by number of KV heads, as the stage `analyze` writes. Calibration checks that these
            heads can change places.
    """

    kv_heads: Any = option(
        MISSING,
        "a divisor or multiple of what it has; per layer: [8,4,4,2]; {average: 3}",
        valid=_COUNTS,
    )
    merge: Merge = option(Merge.mean, " | ".join(merge.value for merge in Merge))
    grouping: Grouping = option(
        Grouping.contiguous, "which KV heads share: contiguous | similarity"
    )
    groups: Any = option(None, "instead, by layer: {0: [[0, 3], [1, 2]]}, or a file")
    layers: list[int] | None = option(None, LAYERS_HELP)

    def __post_init__(self) -> None:
        given = self.kv_heads
        if isinstance(given, Mapping):
            number = given.get(AVERAGE)
            right = set(given) == {AVERAGE} and type(number) in (int, float)
        else:
            counts = given if isinstance(given, (list, tuple)) and given else [given]
            right = all(type(count) is int for count in counts)
        if not right:
            raise ConfigError(
                self.get_key("kv_heads"),
                "must be a number of heads",
                given=repr(given),
                valid=_COUNTS,
            )
        if isinstance(self.groups, str):
            self.groups = self._read_groups(self.groups)
        if self.groups is not None and (not isinstance(self.groups, Mapping) or self.average):
            problem = (
                "cannot be given with an average"
                if self.average
                else "must be lists of heads by layer"
            )
            raise ConfigError(self.get_key("groups"), problem, given=self.groups, valid=_GROUPS)

    @property
    def average(self) -> float | None:
        """The budget; ``None`` where `kv_heads` gives numbers."""
        return self.kv_heads[AVERAGE] if isinstance(self.kv_heads, Mapping) else None

    @property
    def rewrites(self) -> bool:
        """Whether calibrated coefficients make the new heads."""
        return self.merge in _REWRITING

    @property
    def calibrated(self) -> bool:
        return (
            self.rewrites
            or self.grouping is Grouping.similarity
            or self.average is not None
            or self.groups is not None
        )

    def list_counts(self, sites: Sequence[Site]) -> list[int]:
        """List KV heads per site; for a budget, the most that all can have within it.

        Raises:
            ConfigError: a list of another length, or a count that a site cannot have.
        """
        given = self.kv_heads
        if self.average is not None:
            self._check_average(sites)
            shared = set.intersection(*(set(list_divisors(site.kv_heads)) for site in sites))
            counts = [max(n for n in shared if n <= self.average)] * len(sites)
        elif isinstance(given, int):
            counts = [given] * len(sites)
        else:
            if len(given) != len(sites):
                raise ConfigError(
                    self.get_key("kv_heads"),
                    f"has {len(given)} numbers for {len(sites)} layers",
                    given=list(given),
                    valid=_COUNTS,
                )
            counts = list(given)
        for site, count in zip(sites, counts, strict=True):
            self._check_count(site, count)
        return counts

    def _read_groups(self, path: str) -> Any:
        try:
            found = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            problem = getattr(error, "strerror", None) or "it is not JSON"
            raise ConfigError(
                self.get_key("groups"), f"cannot be read: {problem}", given=path
            ) from None
        counts = found if isinstance(found, dict) else {}
        if str(self.kv_heads) not in counts:
            raise ConfigError(
                self.get_key("groups"),
                f"this file has no groups for {self.kv_heads} KV heads",
                given=path,
                valid=sorted(counts),
            )
        return counts[str(self.kv_heads)]

    def get_groups(self, site: Site, count: int) -> Parts | None:
        """Get the entry of `groups` for a site, ascending; ``None`` where there is none.

        Raises:
            ConfigError: no `count` equal groups that hold each of its KV heads once.
        """
        found = {str(layer): groups for layer, groups in (self.groups or {}).items()}
        groups = found.get(str(site.layer))
        if groups is None:
            return None
        if count > site.kv_heads:
            raise ConfigError(
                self.get_key("groups"),
                f"the KV heads of {site.path} are repeated, so none of them share one",
                given=groups,
                valid="no groups for that layer",
            )
        lists = isinstance(groups, (list, tuple)) and all(
            isinstance(group, (list, tuple)) and all(type(head) is int for head in group)
            for group in groups
        )
        made = tuple(sorted(tuple(sorted(group)) for group in groups)) if lists else ()
        members = sorted(head for group in made for head in group)
        equal = {len(group) for group in made} == {site.kv_heads // count}
        if members != list(range(site.kv_heads)) or len(made) != count or not equal:
            raise ConfigError(
                self.get_key("groups"),
                f"must put the {site.kv_heads} KV heads of {site.path} into {count} equal groups",
                given=groups,
                valid=_GROUPS,
            )
        return made

    def _check_average(self, sites: Sequence[Site]) -> None:
        average, most = self.average, max(site.kv_heads for site in sites)
        assert average is not None
        if not 1 <= average <= most:
            raise ConfigError(
                self.get_key("kv_heads"),
                "the average number of KV heads is out of range",
                given={AVERAGE: average},
                valid=f"1 to {most}",
            )

    def _check_count(self, site: Site, count: int) -> None:
        key = self.get_key("kv_heads")
        valid = _list_valid_counts(site)
        if count in valid:
            return
        if count > site.q_heads:
            problem = f"more than the {site.q_heads} query heads of {site.path}"
        elif count > site.kv_heads:
            problem = (
                f"the {site.kv_heads} KV heads of {site.path} cannot be repeated to as many, and "
                f"shared evenly by {site.q_heads} query heads"
            )
        else:
            problem = f"does not divide the {site.kv_heads} KV heads of {site.path}"
        raise ConfigError(key, problem, given=count, valid=valid)


def list_divisors(heads: int) -> list[int]:
    """List what a number of KV heads can be merged to, ascending."""
    return [n for n in range(1, heads + 1) if heads % n == 0]


def _list_valid_counts(site: Site) -> list[int]:
    """List what the KV heads of a site can be merged or repeated to, ascending."""
    repeated = range(2 * site.kv_heads, site.q_heads + 1, site.kv_heads)
    return list_divisors(site.kv_heads) + [n for n in repeated if site.q_heads % n == 0]
