"""The long table: a line per step, layer and head, a column per metric."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from surgery.callbacks import AttentionStatistics, HeadImportance, HeadTable

from tests.callbacks.fitting import OwnModule, by_layer, fit, unpadded
from tests.tiny_models import tiny_model, tokens

BATCHES = [unpadded(tokens(2, 6, seed=i)) for i in range(5)]
COLUMNS = [
    "step",
    "layer",
    "head",
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
]


def test_monitors_of_unlike_cadence_share_a_table(tmp_path: Path) -> None:
    importance, entropy = HeadImportance(2, 2), AttentionStatistics(3, 3)
    root = tmp_path / "not" / "there" / "yet"
    fit(OwnModule(tiny_model("llama")), BATCHES, [importance, HeadTable(), entropy], root)
    table = pq.read_table(root / "heads.parquet")
    assert table.column_names == COLUMNS
    rows = table.to_pylist()
    keys = [(row["step"], row["layer"], row["head"]) for row in rows]
    assert keys == [(s, layer, head) for s in (0, 2, 3, 4) for layer in (0, 1) for head in range(4)]

    for monitor, names in ((importance, COLUMNS[3:4]), (entropy, COLUMNS[4:])):
        seen = {observation["step"]: observation for observation in monitor.observations}
        for row in rows:
            for name in names:
                if row["step"] in seen:
                    layers = by_layer(seen[row["step"]], name)
                    value = layers[row["layer"]][row["head"]].item()
                    assert row[name] == (None if math.isnan(value) else value)
                else:
                    assert row[name] is None


def test_what_could_not_be_seen_is_null(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    fit(
        OwnModule(model),
        BATCHES[:1],
        [HeadImportance(1, 1), AttentionStatistics(1, 1), HeadTable()],
        tmp_path,
    )
    rows = pq.read_table(tmp_path / "heads.parquet").to_pylist()
    for row in rows:
        assert (row["head_importance"] is None) == (row["layer"] == 0)
        assert row["attention_entropy"] is not None


def test_column_types(tmp_path: Path) -> None:
    fit(
        OwnModule(tiny_model("llama")),
        BATCHES[:1],
        [AttentionStatistics(1, 1), HeadTable()],
        tmp_path,
    )
    schema = pq.read_schema(tmp_path / "heads.parquet")
    assert [str(field.type) for field in schema] == ["int64"] * 3 + ["float"] * 12


@pytest.mark.parametrize("callbacks", [[HeadTable()], [HeadTable(), HeadImportance(1, 1)]])
def test_there_is_no_table_of_nothing(callbacks: list[object], tmp_path: Path) -> None:
    fit(OwnModule(tiny_model("llama")), [], callbacks, tmp_path)  # type: ignore[arg-type]
    assert not (tmp_path / "heads.parquet").exists()


def test_layers_of_unlike_width(tmp_path: Path) -> None:
    model = tiny_model("llama")
    attention = model.model.layers[0].self_attn
    attention.q_proj = torch.nn.Linear(32, 16, bias=False)
    attention.k_proj, attention.v_proj = (torch.nn.Linear(32, 8, bias=False) for _ in range(2))
    attention.o_proj = torch.nn.Linear(16, 32, bias=False)
    fit(OwnModule(model), BATCHES[:1], [AttentionStatistics(1, 1), HeadTable()], tmp_path)
    rows = pq.read_table(tmp_path / "heads.parquet").to_pylist()
    assert [(row["layer"], row["head"]) for row in rows] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        (1, 2),
        (1, 3),
    ]
