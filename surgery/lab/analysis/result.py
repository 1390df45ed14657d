"""What was found of every head, as `heads.json`, as parquet, and in short."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from surgery.files import write_json
from surgery.lab.analysis.behaviour import Behaviour
from surgery.lab.analysis.clusters import nearest, redundancies
from surgery.lab.analysis.probes import Judged
from surgery.lab.analysis.roles import MIXED, ROLES, Thresholds, role_of
from surgery.lab.analysis.similarity import Similarity
from surgery.models.sites import Site

FORMAT = 1
_LONG = 6  # digits after the point


def heads_of(
    sites: Sequence[Site],
    behaviour: Mapping[str, Behaviour],
    repeats: Mapping[str, Mapping[str, Sequence[float | None]]],
    judged: Mapping[str, Judged],
    thresholds: Thresholds,
) -> list[dict[str, Any]]:
    """One entry per head, site after site: what it does, by itself; see docs/analysis.md."""
    found: list[dict[str, Any]] = []
    for site in sites:
        seen = behaviour[site.path]
        for head in range(site.q_heads):
            here = (site.layer, head)
            margins = {n: one.margin[here] for n, one in judged.items() if here in one.margin}
            relation = max(margins, key=margins.__getitem__, default=None)
            scores = {
                **{name: row[head] for name, row in repeats.get(site.path, {}).items()},
                "previous_token": seen.statistics["previous_token"][head],
                "positional": seen.shares[head],
                "syntactic": None if relation is None else margins[relation],
                "first_token": seen.statistics["first_token"][head],
                "broadcast": seen.statistics["normalized_entropy"][head],
            }
            found.append(
                {
                    "layer": site.layer,
                    "head": head,
                    "kv_head": head // site.group_size,
                    "role": role_of(scores, thresholds),
                    "scores": {role: scores.get(role) for role in ROLES},
                    "offset": seen.offsets[head],
                    "relation": relation,
                    "statistics": {name: row[head] for name, row in seen.statistics.items()},
                    "probes": {name: one.accuracy.get(here) for name, one in judged.items()},
                }
            )
    return found


def beside_others(
    heads: Sequence[Mapping[str, Any]], similarity: Similarity, families: Sequence[int]
) -> list[dict[str, Any]]:
    """The same heads, with how they compare: `redundancy`, `nearest`, `cluster`, and their size."""
    sizes = similarity.gram.diagonal().clamp(min=0).sqrt().tolist()
    shares, others = redundancies(similarity).tolist(), nearest(similarity.divergence)
    return [
        {
            **head,
            "statistics": head["statistics"] | {"contribution_norm": sizes[number]},
            "redundancy": shares[number],
            "nearest": list(similarity.heads[others[number]]),
            "cluster": families[number],
        }
        for number, head in enumerate(heads)
    ]


def probes_json(judged: Mapping[str, Judged]) -> dict[str, Any]:
    return {
        name: {
            "source": one.source,
            "pairs": one.pairs,
            "judged": one.judged,
            "best": {"layer": one.best[0], "head": one.best[1], "accuracy": one.accuracy[one.best]},
            "offset": {"offset": one.offset, "accuracy": one.offset_accuracy},
        }
        for name, one in judged.items()
    }


def save_heads(result: Mapping[str, Any], path: Path) -> None:
    """`path` (.json), and a line per head in its parquet twin."""
    write_json(path, rounded(result))
    pq.write_table(to_arrow(result["heads"]), path.with_suffix(".parquet"))


def to_arrow(heads: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Columns: those of a head, ``score_ROLE``, each statistic, ``probe_RELATION``."""
    lines = []
    for head in heads:
        near = head["nearest"]
        lines.append(
            {
                **{
                    name: head[name]
                    for name in (
                        "layer",
                        "head",
                        "kv_head",
                        "role",
                        "offset",
                        "relation",
                        "redundancy",
                        "cluster",
                    )
                },
                "nearest_layer": near[0],
                "nearest_head": near[1],
                **{f"score_{role}": head["scores"][role] for role in ROLES},
                **head["statistics"],
                **{f"probe_{name}": value for name, value in head["probes"].items()},
            }
        )
    return pa.Table.from_pylist(lines)


def in_short(result: Mapping[str, Any], files: Sequence[str]) -> dict[str, Any]:
    """What `summary.json` says of it."""
    roles = Counter(head["role"] for head in result["heads"])
    return {
        "roles": {role: roles[role] for role in (*ROLES, MIXED) if roles[role]},
        "probes": {
            name: {
                "pairs": one["pairs"],
                "head": [one["best"]["layer"], one["best"]["head"]],
                "accuracy": round(one["best"]["accuracy"], _LONG),
                "offset": one["offset"]["offset"],
                "offset_accuracy": round(one["offset"]["accuracy"], _LONG),
            }
            for name, one in result["probes"].items()
        },
        "files": list(files),
    }


def rounded(value: Any) -> Any:
    """The same with numbers cut to what can be meant; what is no number becomes ``None``."""
    if isinstance(value, Mapping):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(one) for one in value]
    if isinstance(value, float):
        return round(value, _LONG) if value == value and abs(value) != torch.inf else None
    return value
