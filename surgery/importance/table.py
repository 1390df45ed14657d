"""The score table: estimators fill it, operations that remove heads read it; JSON and parquet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from surgery.config.hints import shorten
from surgery.errors import SurgeryError
from surgery.files import write_json, write_table

FORMAT = 1
# What is scored: query heads, or KV groups (a KV head with the query heads that share it).
HEADS, GROUPS = "heads", "groups"
UNITS = (HEADS, GROUPS)
ESTIMATORS = ("gate_gradient", "output_norm", "leave_one_out", "random")


@dataclass(frozen=True)
class SiteScores:
    """The scores of one site. The higher a score, the more is lost without the head.

    Attributes:
        layer: number of the site in the model, from 0.
        site: path of the site.
        scores: one per query head or KV group.
        errors: standard error of each score over batches; NaN for a single batch.
    """

    layer: int
    site: str
    scores: tuple[float, ...]
    errors: tuple[float, ...]


@dataclass(frozen=True)
class ScoreTable:
    """Scores of every head, every KV group, or both.

    Attributes:
        estimator: one of `ESTIMATORS`, or how several tables were combined.
        objective: which loss (``lm`` or ``distill``); see `surgery.importance.losses`.
        heads, groups: in the order of the layers; ``None`` if not asked for.
        model: name of the model.
        data: name of the data.
        batches, tokens: amount of data used.
        seed: seed of random draws.
        loss: loss of the unchanged model on the same batches (nats per token); ``None`` if the
            estimator did not need it.
        unit_of_scores: ``nats`` if a score is a loss, else its own unit.
    """

    estimator: str
    objective: str
    heads: tuple[SiteScores, ...] | None
    groups: tuple[SiteScores, ...] | None
    model: str = ""
    data: str = ""
    batches: int = 0
    tokens: int = 0
    seed: int = 0
    loss: float | None = None
    unit_of_scores: str = "nats"

    def get_scores(self, unit: str) -> tuple[SiteScores, ...]:
        """Return the scores of ``heads`` or ``groups``.

        Raises:
            SurgeryError: the table does not have them.
        """
        found = self.heads if unit == HEADS else self.groups
        if found is None:
            raise SurgeryError(f"this table of {self.estimator} has no scores of {unit}")
        return found

    def describe(self) -> dict[str, Any]:
        """Return everything except the scores, for summaries and artifacts."""
        return {name: getattr(self, name) for name in _PLAIN}

    def to_json(self) -> dict[str, Any]:
        known = self.heads or self.groups or ()
        return {
            "format": FORMAT,
            "estimator": self.estimator,
            "objective": self.objective,
            "unit_of_scores": self.unit_of_scores,
            "model": self.model,
            "data": self.data,
            "batches": self.batches,
            "tokens": self.tokens,
            "seed": self.seed,
            "loss": self.loss,
            "layers": [site.layer for site in known],
            "sites": [site.site for site in known],
            "scores": _to_lists(self.heads, "scores"),
            "standard_errors": _to_lists(self.heads, "errors"),
            "group_scores": _to_lists(self.groups, "scores"),
            "group_standard_errors": _to_lists(self.groups, "errors"),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ScoreTable:
        """Make a table from what `to_json` returned.

        Raises:
            SurgeryError: the format is another one, or the table is incomplete.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, Mapping) else data
            raise SurgeryError(f"a score table of format {shorten(found)}, not {FORMAT}")
        try:
            where = list(zip(data["layers"], data["sites"], strict=True))
            return cls(
                heads=_parse_sites(where, data["scores"], data["standard_errors"]),
                groups=_parse_sites(where, data["group_scores"], data["group_standard_errors"]),
                **{name: data[name] for name in _PLAIN},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise SurgeryError(
                f"an incomplete score table: {type(error).__name__} {error}"
            ) from None

    def to_arrow(self) -> pa.Table:
        """Make a row per layer and head (or group): layer, site, unit, index, score, error."""
        lines: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
        for unit, sites in ((HEADS, self.heads), (GROUPS, self.groups)):
            for site in sites or ():
                for index, (score, error) in enumerate(zip(site.scores, site.errors, strict=True)):
                    values = (site.layer, site.site, unit, index, score, error)
                    for name, value in zip(_COLUMNS, values, strict=True):
                        lines[name].append(value)
        return pa.table({name: pa.array(lines[name], kind) for name, kind in _COLUMNS.items()})

    def save(self, path: str | Path) -> None:
        """Write the table to `path` (.json), and beside it to the same name with .parquet."""
        path = Path(path)
        write_json(path, self.to_json())
        write_table(path.with_suffix(".parquet"), self.to_arrow())


_PLAIN = (
    "estimator",
    "objective",
    "unit_of_scores",
    "model",
    "data",
    "batches",
    "tokens",
    "seed",
    "loss",
)
_COLUMNS = {
    "layer": pa.int64(),
    "site": pa.string(),
    "unit": pa.string(),
    "index": pa.int64(),
    "score": pa.float64(),
    "standard_error": pa.float64(),
}


def _to_lists(sites: Sequence[SiteScores] | None, name: str) -> list[list[float | None]] | None:
    if sites is None:
        return None
    # JSON has no NaN.
    return [[x if x == x else None for x in getattr(site, name)] for site in sites]


def _parse_sites(
    where: Sequence[tuple[int, str]], scores: Any, errors: Any
) -> tuple[SiteScores, ...] | None:
    if scores is None:
        return None
    return tuple(
        SiteScores(layer, site, tuple(map(float, row)), tuple(map(_parse_number, spread)))
        for (layer, site), row, spread in zip(where, scores, errors, strict=True)
    )


def _parse_number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
