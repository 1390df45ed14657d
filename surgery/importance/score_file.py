"""Score tables as `prune_heads` takes them: a number per query head, per KV group, or both."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from surgery.errors import ConfigError
from surgery.importance import ScoreTable, SiteScores
from surgery.importance.table import GROUPS, HEADS
from surgery.models.sites import Site

_VALID = 'a JSON file: {"scores": [[one number per query head] per layer]}, or a score table'
# Of a table: unit → key of its rows in JSON.
_ROWS = {HEADS: "scores", GROUPS: "group_scores"}

Rows = Mapping[int, Sequence[float]]


@dataclass(frozen=True)
class HeadScores:
    """What is lost with each head; the lowest go first.

    Attributes:
        heads: layer → one number per query head; ``None`` where only groups were scored.
        groups: layer → one number per KV group; ``None``: a group's is the sum of its heads'.
    """

    heads: Rows | None = None
    groups: Rows | None = None

    @classmethod
    def of(cls, table: ScoreTable, sites: Sequence[Site]) -> HeadScores:
        """Those of `sites`, which are found by their paths."""
        return cls(_of_sites(table.heads, sites), _of_sites(table.groups, sites))


def read_scores(
    path: str, sites: Sequence[Site], key: str, *, unit: str = HEADS, layers: int | None = None
) -> HeadScores:
    """Read a `ScoreTable` (JSON or its parquet twin), or ``{"scores": [[...]]}`` alone.

    Args:
        sites: those whose scores are wanted.
        unit: ``groups`` where scores of KV groups alone are enough.
        layers: how many the model has; ``None``: the table may be of more.

    Raises:
        ConfigError: no such file, no table, or one of another model.
    """
    table = _parquet(path, key) if Path(path).suffix == ".parquet" else _json(path, key)
    rows = {unit: _rows(table, name, path, key) for unit, name in _ROWS.items()}
    if rows[HEADS] is None and (unit == HEADS or rows[GROUPS] is None):
        only = " of query heads, only of KV groups" if rows[GROUPS] is not None else " table"
        problem = f"holds no score{'s' if rows[GROUPS] is not None else ''}{only}"
        raise ConfigError(key, problem, given=path, valid=_VALID)
    for one, found in rows.items():
        if found is not None:
            _check(found, one, sites, layers, path, key)
    return HeadScores(rows[HEADS], rows[GROUPS])


def _of_sites(scored: Sequence[SiteScores] | None, sites: Sequence[Site]) -> Rows | None:
    if scored is None:
        return None
    by_path = {one.site: one.scores for one in scored}
    return {site.layer: by_path[site.path] for site in sites}


def _json(path: str, key: str) -> Any:
    try:
        return json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(key, f"cannot be read: {error.strerror}", given=path) from None
    except ValueError as error:
        raise ConfigError(key, f"is no JSON: {error}", given=path, valid=_VALID) from None


def _parquet(path: str, key: str) -> dict[str, Any]:
    """The same rows as in JSON."""
    try:
        lines = pq.read_table(Path(path).expanduser()).to_pylist()
    except OSError as error:
        problem = f"cannot be read: {error.strerror or 'no parquet'}"
        raise ConfigError(key, problem, given=path) from None
    except pa.ArrowException as error:
        raise ConfigError(key, f"is no parquet: {error}", given=path, valid=_VALID) from None
    found: dict[str, dict[int, dict[int, Any]]] = {}
    try:
        for line in lines:
            layers = found.setdefault(_ROWS[line["unit"]], {})
            layers.setdefault(int(line["layer"]), {})[int(line["index"])] = line["score"]
    except (KeyError, TypeError, ValueError):
        raise ConfigError(key, "holds no score table", given=path, valid=_VALID) from None
    table: dict[str, Any] = {}
    for name, layers in found.items():
        table["layers"] = sorted(layers)
        table[name] = [[row[n] for n in sorted(row)] for _, row in sorted(layers.items())]
    return table


def _rows(table: Any, name: str, path: str, key: str) -> dict[int, list[Any]] | None:
    """Layer → its scores."""
    if isinstance(table, list):
        table = {_ROWS[HEADS]: table}
    rows = table.get(name) if isinstance(table, dict) else None
    if rows is None:
        return None
    layers = table.get("layers", range(len(rows)) if isinstance(rows, list) else ())
    right = isinstance(rows, list) and all(isinstance(row, list) for row in rows)
    if not right or not all(type(n) is int for n in layers) or len(layers) != len(rows):
        raise ConfigError(key, "holds no score table", given=path, valid=_VALID)
    return dict(zip(layers, rows, strict=True))


def _check(
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
                key, f"a score of layer {site.layer} is no finite number", given=path, valid=_VALID
            )


def is_score(value: Any) -> bool:
    """Whether heads can be ordered by it."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
