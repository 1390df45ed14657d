"""Run directories as a run leaves them, made up: real writers, figures that were never measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from surgery.importance.table import ScoreTable, SiteScores
from surgery.lab.analysis.result import summarize
from surgery.lab.report.summary import FORMAT, describe_machine, find_versions
from surgery.models.sites import Projection, Site
from surgery.plan.plan import Export, Plan
from surgery.plan.sizes import Sizes
from surgery.transforms.edits import SiteChange

METRICS = (
    "head_importance",
    "attention_entropy",
    "normalized_entropy",
    "max_logit",
    "saturation",
    "confidence",
    "first_token",
    "previous_token",
    "own_token",
    "same_token",
    "induction",
    "distance",
    "output_norm",
)
TOKENS = 512
ROLES = ("previous_token", "first_token", "induction", "duplicate_token", "broadcast", "mixed")


def summary(
    name: str = "tiny", loss: float = 1.2, kv: int = 2048, **changes: Any
) -> dict[str, Any]:
    """A `summary.json` of a converted and healed model."""
    found = {
        "format": FORMAT,
        "stages": ["plan", "measure", "operate", "train", "export", "report"],
        "seed": 0,
        "model": {"name": name, "class": "LlamaForCausalLM", "model_type": "llama"},
        "operations": [{"operation": "gqa", "kv_heads": 2, "merge": "mean", "layers": None}],
        "planned": {"tokens": TOKENS, "before": _sizes(8192), "after": _sizes(kv)},
        "before": _measured(1.0, 8192),
        "after_surgery": _measured(2.5, kv),
        "after_training": _measured(loss, kv),
        "gap_noise": 0.01,
        "gap_closed": (2.5 - loss) / 1.5,
        "samples": None,
        "calibration": None,
        "importance": None,
        "analysis": None,
        "comparison": None,
        "tasks": None,
        "training": {
            "steps": 100,
            "tokens": 409600,
            "data": "stdlib",
            "seq_len": 512,
            "objective": "lm",
            "attention_weight": 0.0,
            "teacher": None,
            "optimizer": "adamw",
            "parameters": "all",
            "trainable_parameters": 2893824,
            "lr": 0.003,
            "rate": {"share": 1.0, "reason": "the reason"},
            "final_train_loss": loss,
            "checkpoint": None,
            "decision": None,
            "held_out": None,
            "reverted": None,
            "heads": None,
            "alarms": [],
            "curve": [[step, loss + 1.3 * 0.95**step] for step in range(1, 101)],
        },
        "export": {
            "path": "export",
            "format": "native",
            "reason": "the architecture's own config says the result",
            "runtimes": ["transformers", "vllm", "llama.cpp"],
            "without": {},
            "positions": 2048,
            "dtype": "float32",
            "bytes": 11_000_000,
            "max_logit_difference_after_reload": 0.0,
        },
        "timings": {"load": 0.1, "train": 61.0, "total": 75.0},
        "machine": describe_machine(),
        "versions": find_versions(),
    }
    return found | changes


def _sizes(kv: int) -> dict[str, Any]:
    return Sizes(2_800_000 + 60 * kv, TOKENS * kv, kv, 10**9 + 70_000 * kv).to_json()


def _measured(loss: float, kv: int) -> dict[str, Any]:
    return {
        "loss": loss,
        "perplexity": float(np.exp(loss)),
        **_sizes(kv),
        "cache_bytes_per_token": float(kv),
        "prefill_ms": 65.0,
        "decode_ms": 4.0 + kv / 10_000,
    }


def write_run(directory: Path, config: str = "", **changes: Any) -> Path:
    """`summary.json`, and `config.yaml` where its text is given."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "summary.json").write_text(json.dumps(summary(**changes)))
    if config:
        (directory / "config.yaml").write_text(config)
    return directory


def _tell(directory: Path, part: str, said: dict[str, Any]) -> None:
    """Let the run's summary, where there is one, say that the run wrote a file."""
    file = directory / "summary.json"
    if file.exists():
        found = json.loads(file.read_text())
        found[part] = (found[part] or {}) | said
        file.write_text(json.dumps(found))


def write_heads(
    directory: Path, steps: list[int], layers: int, heads: int, metrics: tuple[str, ...] = METRICS
) -> dict[str, np.ndarray]:
    """`heads.parquet`, each metric drawn anew at every step; returns them as [step, layer, head].

    Importance is heavy-tailed, as it is, and is observed at every other step only.
    """
    draw = np.random.default_rng(0)
    shape = (len(steps), layers, heads)
    grid = np.meshgrid(steps, np.arange(layers), np.arange(heads), indexing="ij")
    columns: dict[str, Any] = {
        key: pa.array(part.ravel().astype(np.int64))
        for key, part in zip(("step", "layer", "head"), grid, strict=True)
    }
    drawn = {}
    for name in metrics:
        values = draw.random(shape, dtype=np.float32)
        if name == "head_importance":
            values = np.exp(6 * values)
            values[1::2] = np.nan
        drawn[name] = values
        columns[name] = pa.array(values.ravel(), from_pandas=True)
    pq.write_table(pa.table(columns), directory / "heads.parquet")
    _tell(directory, "training", {"heads": "heads.parquet"})
    return drawn


def write_importance(directory: Path, layers: int, heads: int) -> None:
    draw = np.random.default_rng(1)
    sites = tuple(
        SiteScores(
            layer,
            f"model.layers.{layer}.self_attn",
            tuple(draw.exponential(0.05, heads).tolist()),
            tuple(draw.exponential(0.005, heads).tolist()),
        )
        for layer in range(layers)
    )
    table = ScoreTable("leave_one_out", "lm", sites, None, "tiny", "stdlib", 4, 16384)
    table.save(directory / "importance.json")
    _tell(directory, "importance", table.describe())


def write_analysis(directory: Path, layers: int, heads: int) -> dict[str, Any]:
    """`analysis/heads.json`: roles, statistics, probes of every head."""
    draw = np.random.default_rng(2)
    found = {
        "format": 1,
        "model": "tiny",
        "data": "stdlib",
        "windows": 32,
        "rows": 64,
        "thresholds": {"previous_token": 0.5, "first_token": 0.5},
        "heads": [
            {
                "layer": layer,
                "head": head,
                "kv_head": head // 4,
                "role": ROLES[int(draw.integers(len(ROLES)))],
                "scores": {role: float(draw.random()) for role in ROLES[:-1]},
                "statistics": {"attention_entropy": float(draw.random() * 3)},
                "redundancy": float(draw.random()),
                "nearest": [layer, (head + 1) % heads],
                "cluster": int(draw.integers(4)),
                "probes": {"use -> definition": float(draw.random())},
            }
            for layer in range(layers)
            for head in range(heads)
        ],
        "probes": {
            "use -> definition": {
                "source": "python",
                "pairs": 4321,
                "best": {"layer": 1, "head": 2, "accuracy": 0.61},
                "offset": {"offset": -2, "accuracy": 0.11},
            },
            "bracket": {
                "source": "python",
                "pairs": 987,
                "best": {"layer": 0, "head": 3, "accuracy": 0.82},
                "offset": {"offset": -1, "accuracy": 0.44},
            },
        },
        "clusters": 4,
    }
    (directory / "analysis").mkdir(exist_ok=True)
    (directory / "analysis" / "heads.json").write_text(json.dumps(found))
    _tell(directory, "analysis", summarize(found, ["analysis/heads.json"]))
    return found


LAYERS, HEADS = 4, 8
STEPS = list(range(0, 100, 10))


def plan() -> dict[str, Any]:
    """A plan whose layers differ: 8 KV heads become 2; layer 1 loses two heads, layer 3 all."""
    source = [_site(layer, 8, 8) for layer in range(LAYERS)]
    after = [_site(0, 8, 2), _site(1, 6, 2), _site(2, 8, 2)]
    pairs = [[0, 1, 2, 3], [4, 5, 6, 7]]
    # Head 0 goes, and of the seven that are left the third: head 3.
    changes = [_change(source[1], _site(1, 7, 7), [[head] for head in range(1, 8)])]
    changes += [_change(_site(1, 7, 7), _site(1, 6, 6), [[h] for h in (0, 1, 3, 4, 5, 6)])]
    changes += [_change(source[layer], _site(layer, 8, 2), None, pairs) for layer in (0, 2)]
    changes += [_change(_site(1, 6, 6), after[1], None, [[0, 1, 2], [3, 4, 5]])]
    return Plan(
        model={"name": "tiny", "class": "LlamaForCausalLM", "model_type": "llama"},
        operations=(),
        outcomes=(),
        conversion=None,
        changes=tuple(changes),
        source=tuple(source),
        before=tuple(source),
        after=tuple(after),
        left_alone=(),
        layers={source[2].path: {"positions": "none"}},
        attributes={},
        head_attributes={},
        config_patch={"num_key_value_heads": 2},
        head_patch={},
        steps=(),
        implementation="sdpa",
        notes=("a note",),
        open_decisions=(),
        calibration=None,
        resolved={},
        tokens=TOKENS,
        kv_bytes=4,
        sizes_before=Sizes(**_sizes(8192)),
        sizes_after=Sizes(**_sizes(2048)),
        export=Export("native", "the architecture's own config says the result", (), {}),
    ).to_json()


def _site(layer: int, q_heads: int, kv_heads: int) -> Site:
    path = f"model.layers.{layer}.self_attn"
    query, key, value = (
        Projection(f"{path}.{role}_proj", 64, 8 * heads, False, 8)
        for role, heads in (("q", q_heads), ("k", kv_heads), ("v", kv_heads))
    )
    return Site(
        path=path,
        block=path,
        layer=layer,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=8,
        value_dim=8,
        hidden_size=64,
        query=query,
        key=key,
        value=value,
        output=Projection(f"{path}.o_proj", 8 * q_heads, 64, False, 8),
        q_norm=None,
        k_norm=None,
        cached=True,
        cross=False,
        config_prefix="",
    )


def _change(before: Site, after: Site, heads: Any = None, groups: Any = None) -> SiteChange:
    query = heads or [[head] for head in range(after.q_heads)]
    return SiteChange(before, after, (), _fixed(query), _fixed(groups or query))


def _fixed(groups: list[list[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, groups))


def alarm(kind: str, step: int, layer: int, head: int) -> dict[str, Any]:
    return {
        "alarm": kind,
        "step": step,
        "layer": layer,
        "head": head,
        "value": 0.01,
        "threshold": 0.05,
    }


def samples() -> dict[str, Any]:
    """What a model wrote: of different lengths, with lines, with a word that fits no column."""
    return {
        "new_tokens": 48,
        "texts": [
            {
                "prompt": "def f(x):",
                "before": "\n    return x",
                "after_surgery": "x" * 300,
                "after_training": "",
            },
            {
                "prompt": "What is it?\nSay.",
                "before": "It is <b>",
                "after_surgery": "a " * 90,
                "after_training": "It is",
            },
        ],
        "problems": {},
    }


def write_full_run(directory: Path, **changes: Any) -> Path:
    """A run with every file that a report can be made of."""
    training = summary()["training"] | {"alarms": [alarm("collapse", 40, 2, 5)]}
    sites = {f"model.layers.{layer}.self_attn": {"keys": 0.1, "values": 0.2} for layer in (0, 1)}
    calibration = {
        "batches": 2,
        "tokens": 512,
        "operations": [{"operation": "gqa", "sites": sites}],
    }
    tasks = {
        "mode": "compare",
        "names": ["code", "prose"],
        "estimator": "leave_one_out",
        "losses": {"original": {"code": 1.0, "prose": 1.1}, "code": {"code": 1.0, "prose": 1.4}},
        "spearman": [[1.0, 0.7], [0.7, 1.0]],
        "limit": 0.05,
        "hurts": [{"mask": "code", "task": "prose", "cost": 0.3}],
    }
    found = {
        "training": training,
        "samples": samples(),
        "calibration": calibration,
        "tasks": tasks,
    } | changes
    write_run(directory, "seed: 0\nmodel:\n  path: tiny\n", **found)
    (directory / "plan.json").write_text(json.dumps(plan()))
    write_heads(directory, STEPS, LAYERS, HEADS)
    write_importance(directory, LAYERS, HEADS)
    write_analysis(directory, LAYERS, HEADS)
    return directory
