"""docs/benchmarks/coverage.md, from the kept figures alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.coverage.attention_kinds import OTHER_ATTENTION
from benchmarks.coverage.exceptions import SHOWS_NOTHING

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "benchmarks/results/coverage.json"
PAGE = ROOT / "docs/benchmarks/coverage.md"

STATUSES = ("works", "refused", "wrong")
_SIGNS = {"works": "✓", "refused": "-", "wrong": "✗"}
_EXPORTS = {"native": "", "record": " r", "converted": " h"}

_HEAD = """# Coverage

<!-- Written by `python -m benchmarks.coverage`; do not edit. -->

Every model type that transformers {transformers} maps to a causal, masked or sequence-to-sequence
language model or to image classification, built as a tiny random model, and every operation
performed on it, compared with its oracle, saved and loaded again:

    python -m benchmarks.coverage

- **gqa**: half the KV heads. Oracle: the original with every group's first KV head standing in for
  all of it, where attention is called.
- **prune_heads**: one KV group less in every layer. Oracle: the original with those heads' slices
  of the output projection's input set to zero.
- **rope**: positions interpolated by two. Oracle: a model that transformers builds from the new
  config.
- **backend**: sdpa. Oracle: eager.
- **fuse_qkv**: one projection for queries, keys and values. Oracle: the original; unfused, its
  weights to the bit.
- **attention_dropout**: all but certain dropout. Oracle: the original with every head silenced; in
  eval mode nothing changes.
- **sliding_window**: three tokens in every layer. Oracle: the original, its attention called with
  masks that show no more.

✓ works, - refused with the reason below, ✗ wrong. `r`: the result is saved as a
[record](../record.md), because the architecture's own config cannot say it. `h`: it was converted
to another architecture, which can. All others are native. `1`: to one KV head only.
Logits may differ from the oracle's by 2e-4 of the largest one (fp32), reloaded ones by nothing
(with experts: by rounding), and the number of parameters must be the planned one. So must be the
bytes that a cache holds after more tokens than sliding windows take, where the original's are. The
figures are kept in `benchmarks/results/coverage.json`.

"""


_VARIANTS = """## Other configs than the defaults

Every switch of a config's class is turned, one at a time. Those that change the modules, tensors or
attributes of attention blocks are here, with the operations whose work depends on these, and the
same oracles. No list of keys says which: a model is built both ways and compared. Run alone:

    python -m benchmarks.coverage variants
"""


def page(found: Mapping[str, Any]) -> str:
    """Markdown: counts, then every type, then every reason."""
    operations = found["operations"]
    parts = [_HEAD.format(**found), _counts(found["types"], operations)]
    for kind, types in found["types"].items():
        parts.append(_table(kind, types, operations))
    for kind, types in found["types"].items():
        parts.append(_reasons(kind, types))
    parts.append(_VARIANTS)
    parts += [
        f"Left out: {name} with another `{key}` ({kind}): {why}.\n"
        for (kind, name, key), why in SHOWS_NOTHING.items()
    ]
    for kind, variants in found["variants"].items():
        if variants:
            columns = list(next(iter(variants.values())))
            parts.append(_table(f"Other configs: {kind}", variants, columns))
            parts.append(_reasons(f"other configs, {kind}", variants))
    return "\n".join(parts)


def _counts(kinds: Mapping[str, Any], operations: list[str]) -> str:
    lines = [
        "| kind | types | " + " | ".join(operations) + " |",
        "| --- | --- |" + " --- |" * len(operations),
    ]
    for kind, types in kinds.items():
        for label, chosen in (
            ("all", types),
            (
                "ordinary softmax attention",
                {t: o for t, o in types.items() if t not in OTHER_ATTENTION},
            ),
        ):
            cells = []
            for operation in operations:
                count = Counter(o[operation]["status"] for o in chosen.values() if operation in o)
                cells.append(" / ".join(str(count[status]) for status in STATUSES))
            lines.append(f"| {kind}, {label} | {len(chosen)} | " + " | ".join(cells) + " |")
    return "\n".join(["## Counts: works / refused / wrong", "", *lines, ""])


def _table(kind: str, types: Mapping[str, Any], operations: list[str]) -> str:
    lines = [
        f"## {kind}",
        "",
        "| type | " + " | ".join(operations) + " |",
        "| --- |" + " --- |" * len(operations),
    ]
    for name, outcomes in types.items():
        if "unbuildable" in outcomes:
            lines.append(f"| {name} | cannot be built here |" + " |" * (len(operations) - 1))
            continue
        lines.append(f"| {name} | " + " | ".join(_cell(outcomes[o]) for o in operations) + " |")
    return "\n".join([*lines, ""])


def _cell(outcome: Mapping[str, Any]) -> str:
    sign = _SIGNS[outcome["status"]]
    if outcome["status"] != "works":
        return sign
    alone = " 1" if outcome.get("reason") else ""
    return f"{sign}{_EXPORTS[outcome['export']]}{alone}"


def _reasons(kind: str, types: Mapping[str, Any]) -> str:
    lines = [f"## Why refused: {kind}", ""]
    for name, outcomes in types.items():
        if "unbuildable" in outcomes:
            lines.append(f"- **{name}** cannot be built: {outcomes['unbuildable']}")
            continue
        reasons: dict[str, list[str]] = {}
        for operation, outcome in outcomes.items():
            if outcome["status"] != "works":
                reasons.setdefault(outcome["reason"], []).append(operation)
        if not reasons:
            continue
        note = f" ({OTHER_ATTENTION[name]})" if name in OTHER_ATTENTION else ""
        lines.append(f"- **{name}**{note}")
        lines += [f"  - {', '.join(which)}: {why}" for why, which in reasons.items()]
    return "\n".join([*lines, ""])
