"""The result for every head: `heads.json`, the same as parquet, and a summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from surgery.files import write_json, write_table
from surgery.lab.analysis.behaviour import Behaviour
from surgery.lab.analysis.clusters import compute_redundancies, find_nearest
from surgery.lab.analysis.probes import ProbeResult
from surgery.lab.analysis.roles import MIXED, ROLES, Thresholds, choose_role
from surgery.lab.analysis.similarity import Similarity
from surgery.models.sites import Site

FORMAT = 1
_LONG = 6  # digits after the point


def describe_heads(
    sites: Sequence[Site],
    behaviour: Mapping[str, Behaviour],
    repeats: Mapping[str, Mapping[str, Sequence[float | None]]],
    probes: Mapping[str, ProbeResult],
    thresholds: Thresholds,
) -> list[dict[str, Any]]:
    """Describe every head by itself, one entry per head, site after site; see docs/analysis.md."""
    entries: list[dict[str, Any]] = []
    for site in sites:
        of_site = behaviour[site.path]
        for head in range(site.q_heads):
            here = (site.layer, head)
            margins = {n: probe.margin[here] for n, probe in probes.items() if here in probe.margin}
            relation = max(margins, key=margins.__getitem__, default=None)
            scores = {
                **{name: row[head] for name, row in repeats.get(site.path, {}).items()},
                "previous_token": of_site.statistics["previous_token"][head],
                "positional": of_site.shares[head],
                "syntactic": None if relation is None else margins[relation],
                "first_token": of_site.statistics["first_token"][head],
                "broadcast": of_site.statistics["normalized_entropy"][head],
            }
            entries.append(
                {
                    "layer": site.layer,
                    "head": head,
                    "kv_head": head // site.group_size,
                    "role": choose_role(scores, thresholds),
                    "scores": {role: scores.get(role) for role in ROLES},
                    "offset": of_site.offsets[head],
                    "relation": relation,
                    "statistics": {name: row[head] for name, row in of_site.statistics.items()},
                    "probes": {name: probe.accuracy.get(here) for name, probe in probes.items()},
                }
            )
    return entries


def add_comparisons(
    heads: Sequence[Mapping[str, Any]], similarity: Similarity, families: Sequence[int]
) -> list[dict[str, Any]]:
    """Add to each head how it compares: `redundancy`, `nearest`, `cluster`, and its size."""
    sizes = similarity.gram.diagonal().clamp(min=0).sqrt().tolist()
    shares, others = compute_redundancies(similarity).tolist(), find_nearest(similarity.divergence)
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


def probes_to_json(probes: Mapping[str, ProbeResult]) -> dict[str, Any]:
    return {
        name: {
            "source": one.source,
            "pairs": one.pairs,
            "judged": one.judged,
            "best": {"layer": one.best[0], "head": one.best[1], "accuracy": one.accuracy[one.best]},
            "offset": {"offset": one.offset, "accuracy": one.offset_accuracy},
        }
        for name, one in probes.items()
    }


def save_heads(result: Mapping[str, Any], path: Path) -> None:
    """Write the result to `path` (.json), and a row per head to the same name with .parquet."""
    write_json(path, round_numbers(result))
    write_table(path.with_suffix(".parquet"), to_arrow(result["heads"]))


def to_arrow(heads: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Make a table of the heads with ``score_ROLE``, each statistic, and ``probe_RELATION``."""
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


def summarize(result: Mapping[str, Any], files: Sequence[str]) -> dict[str, Any]:
    """Summarize the result for `summary.json`."""
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


def round_numbers(value: Any) -> Any:
    """Round all numbers in a value; NaN and infinity become ``None``."""
    if isinstance(value, Mapping):
        return {key: round_numbers(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [round_numbers(one) for one in value]
    if isinstance(value, float):
        return round(value, _LONG) if value == value and abs(value) != torch.inf else None
    return value
