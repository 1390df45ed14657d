"""Read scores from a file: a number per query head, per KV group, or both."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from surgery.config.hints import Size, find_misfit
from surgery.errors import ConfigError
from surgery.files import read_json
from surgery.importance import ScoreTable, SiteScores
from surgery.importance.table import GROUPS, HEADS
from surgery.models.sites import Site

_VALID = 'a JSON file: {"scores": [[one number per query head] per layer]}, or a score table'
# Unit → key of its rows in the JSON of a table.
_ROWS = {HEADS: "scores", GROUPS: "group_scores"}


LayerScores = Mapping[int, Sequence[float]]


@dataclass(frozen=True)
class HeadScores:
    """What is lost with each head; the heads with the lowest scores are removed first.

    Attributes:
        heads: layer → one number per query head; ``None`` if only groups were scored.
        groups: layer → one number per KV group; ``None``: a group's score is the sum of its heads.
    """

    heads: LayerScores | None = None
    groups: LayerScores | None = None

    @classmethod
    def from_table(cls, table: ScoreTable, sites: Sequence[Site]) -> HeadScores:
        """Take the scores of `sites` from a table, by the paths of the sites."""
        return cls(_select_sites(table.heads, sites), _select_sites(table.groups, sites))


def read_scores(
    path: str, sites: Sequence[Site], key: str, *, unit: str = HEADS, layers: int | None = None
) -> HeadScores:
    """Read a `ScoreTable` (JSON or parquet), or only ``{"scores": [[...]]}``.

    Args:
        sites: the sites whose scores are wanted.
        unit: ``groups`` if scores of only the KV groups are enough.
        layers: how many layers the model has; ``None``: the table may have more.

    Raises:
        ConfigError: the file is missing, is not a table, or belongs to another model.
    """
    table = _read_parquet(path, key) if Path(path).suffix == ".parquet" else _read_json(path, key)
    rows = {unit: _parse_rows(table, name, path, key) for unit, name in _ROWS.items()}
    if rows[HEADS] is None and (unit == HEADS or rows[GROUPS] is None):
        problem = "is not a score table"
        if rows[GROUPS] is not None:
            problem = "has no scores of query heads, only of KV groups"
        raise ConfigError(key, problem, given=path, valid=_VALID)
    for scored_unit, scores in rows.items():
        if scores is not None:
            _check_rows(scores, scored_unit, sites, layers, path, key)
    return HeadScores(rows[HEADS], rows[GROUPS])


def _select_sites(scored: Sequence[SiteScores] | None, sites: Sequence[Site]) -> LayerScores | None:
    if scored is None:
        return None
    by_path = {one.site: one.scores for one in scored}
    return {site.layer: by_path[site.path] for site in sites}


def _read_json(path: str, key: str) -> Any:
    try:
        return read_json(Path(os.path.expanduser(path)))
    except OSError as error:
        raise ConfigError(key, f"cannot be read: {error.strerror}", given=path) from None
    except ValueError as error:
        raise ConfigError(key, f"is not valid JSON: {error}", given=path, valid=_VALID) from None


def _read_parquet(path: str, key: str) -> dict[str, Any]:
    """Read a parquet file into the rows that the JSON file would have."""
    try:
        lines = pq.read_table(os.path.expanduser(path)).to_pylist()
    except OSError as error:
        problem = f"cannot be read: {error.strerror or 'not a parquet file'}"
        raise ConfigError(key, problem, given=path) from None
    except (pa.ArrowException, ValueError) as error:
        raise ConfigError(
            key, f"is not a parquet file: {error}", given=path, valid=_VALID
        ) from None
    by_name: dict[str, dict[int, dict[int, Any]]] = {}
    try:
        for line in lines:
            layers = by_name.setdefault(_ROWS[line["unit"]], {})
            layers.setdefault(int(line["layer"]), {})[int(line["index"])] = line["score"]
    except (KeyError, TypeError, ValueError, ArithmeticError):
        raise ConfigError(key, "is not a score table", given=path, valid=_VALID) from None
    table: dict[str, Any] = {}
    for name, layers in by_name.items():
        table["layers"] = sorted(layers)
        table[name] = [[row[n] for n in sorted(row)] for _, row in sorted(layers.items())]
    return table


def _parse_rows(table: Any, name: str, path: str, key: str) -> dict[int, list[Any]] | None:
    """Parse layer → its scores; ``None`` if the table has no such scores."""
    if isinstance(table, list):
        table = {_ROWS[HEADS]: table}
    rows = table.get(name) if isinstance(table, dict) else None
    if rows is None:
        return None
    misfit = find_misfit(rows, list[list[Any]], name)
    layers = list(range(len(rows))) if misfit is None else []
    if "layers" in table:
        layers = table["layers"]
        misfit = misfit or find_misfit(layers, list[Size], "layers")
    if misfit is None and len(set(layers)) != len(rows):
        misfit = f"layers: must be a number for each of the {len(rows)} rows"
    if misfit is not None:
        raise ConfigError(key, f"is not a score table: {misfit}", given=path, valid=_VALID)
    return dict(zip(layers, rows, strict=True))


def _check_rows(
    rows: Mapping[int, Sequence[Any]],
    unit: str,
    sites: Sequence[Site],
    total: int | None,
    path: str,
    key: str,
) -> None:
    what = "heads" if unit == HEADS else "KV groups"
    missing = any(site.layer not in rows for site in sites)
    if total is not None and (len(rows) > total or (len(rows) < total and missing)):
        raise ConfigError(
            key, f"is for {len(rows)} layers; the model has {total}", given=path, valid=_VALID
        )
    for site in sites:
        if site.layer not in rows:
            raise ConfigError(
                key, f"has no scores for layer {site.layer}", given=path, valid=_VALID
            )
        row, heads = rows[site.layer], site.q_heads if unit == HEADS else site.kv_heads
        if len(row) != heads:
            raise ConfigError(
                key,
                f"has {len(row)} scores for the {heads} {what} of layer {site.layer}",
                given=path,
                valid=_VALID,
            )
        if not all(is_score(score) for score in row):
            raise ConfigError(
                key,
                f"a score of layer {site.layer} is not a finite number",
                given=path,
                valid=_VALID,
            )


def is_score(value: Any) -> bool:
    """Whether heads can be ordered by this value: a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False
