"""Score tables: one number per layer and head, and which heads score lowest."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from surgery.anatomy import Site
from surgery.errors import ConfigError

Scores = dict[int, list[float]]
_VALID = 'a JSON file: {"scores": [[one number per query head] per layer]}'


def read_scores(path: str, sites: Sequence[Site], key: str) -> Scores:
    """Layer → score of every query head.

    Raises:
        ConfigError: no such file, no table, or one of another model.
    """
    try:
        table = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(key, f"cannot be read: {error.strerror}", given=path) from None
    except ValueError as error:
        raise ConfigError(key, f"is no JSON: {error}", given=path, valid=_VALID) from None
    rows = table.get("scores") if isinstance(table, dict) else table
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise ConfigError(key, "holds no score table", given=path, valid=_VALID)
    if len(rows) != len(sites):
        raise ConfigError(
            key, f"is for {len(rows)} layers; the model has {len(sites)}", given=path, valid=_VALID
        )
    for site, row in zip(sites, rows, strict=True):
        if len(row) != site.q_heads:
            raise ConfigError(
                key, f"has {len(row)} scores for the {site.q_heads} heads of layer {site.layer}",
                given=path, valid=_VALID,
            )  # fmt: skip
        if not all(_is_score(score) for score in row):
            raise ConfigError(
                key, f"a score of layer {site.layer} is no finite number", given=path, valid=_VALID
            )
    return {site.layer: [float(s) for s in row] for site, row in zip(sites, rows, strict=True)}


def lowest(
    sites: Sequence[Site],
    scores: Scores,
    *,
    amount: float | None,
    count: int | None,
    together: bool,
    by_group: bool,
    empty: bool,
    key: str,
) -> dict[int, list[int]]:
    """The heads to remove, cheapest first: layer → query heads.

    What goes at once is a KV group with its query heads, or one query head of every group; its
    cost is the sum of its heads' scores. Ties go to the lower layer and head.

    Args:
        amount, count: the share or number of heads; of each layer, or of all if `together`.
        by_group: whether whole groups go.
        empty: whether a layer may lose all.
        key: config key, for messages.

    Raises:
        ConfigError: as many cannot go.
    """
    moves = {site.layer: _moves(site, scores[site.layer], by_group) for site in sites}
    chosen: dict[int, list[int]] = {}
    given = amount if count is None else count
    if together:
        total = sum(site.q_heads for site in sites)
        # A layer's moves are taken in their order, so the cheapest is always some layer's next.
        ranked = sorted(
            (cost, layer, number)
            for layer, found in moves.items()
            for number, (cost, _) in enumerate(found[: len(found) if empty else -1])
        )
        wanted = _wanted(total, amount, count)
        most = sum(len(moves[layer][number][1]) for _, layer, number in ranked)
        for _, layer, number in ranked:
            heads = moves[layer][number][1]
            if wanted >= len(heads):
                chosen.setdefault(layer, []).extend(heads)
                wanted -= len(heads)
        _check_reached(
            wanted,
            min(len(found[0][1]) for found in moves.values()),
            most,
            given,
            empty=empty,
            key=key,
        )
        return {layer: sorted(heads) for layer, heads in chosen.items()}
    for site in sites:
        wanted = _wanted(site.q_heads, amount, count)
        found = moves[site.layer][: None if empty else -1]
        each = len(moves[site.layer][0][1])
        taken = found[: wanted // each]
        left = wanted - sum(len(heads) for _, heads in taken)
        _check_reached(left, each, each * len(found), given, empty=empty, key=key)
        chosen[site.layer] = sorted(head for _, heads in taken for head in heads)
    return chosen


def _moves(site: Site, scores: Sequence[float], by_group: bool) -> list[tuple[float, list[int]]]:
    size = site.group_size
    groups = [list(range(start, start + size)) for start in range(0, site.q_heads, size)]
    if by_group:
        found = [(sum(scores[head] for head in group), group) for group in groups]
        return sorted(found, key=lambda move: (move[0], move[1]))
    ranked = [sorted(group, key=lambda head: (scores[head], head)) for group in groups]
    return [
        (sum(scores[group[n]] for group in ranked), [group[n] for group in ranked])
        for n in range(size)
    ]


def _wanted(heads: int, amount: float | None, count: int | None) -> int:
    return count if count is not None else math.floor((amount or 0.0) * heads + 1e-9)


def _check_reached(
    missing: int, each: int, most: int, given: float | None, *, empty: bool, key: str
) -> None:
    if missing >= each:
        more = "" if empty else ", or attention.prune_heads.remove_attention=true"
        raise ConfigError(
            key,
            "there are not so many heads" if empty
            else "a layer keeps at least one head (or group of them)",
            given=given, valid=f"at most {most} heads{more}",
        )  # fmt: skip


def _is_score(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
