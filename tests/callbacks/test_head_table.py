"""The long table: a line per step, layer and head, a column per metric."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from pytorch_lightning.loggers import CSVLogger
from surgery.callbacks import AttentionStatistics, HeadImportance, HeadTable

from surgery.errors import ConfigError
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


def write_table(root: Path, steps: int, table: HeadTable, **options: Any) -> None:
    monitor = HeadImportance(1, 1)
    fit(OwnModule(tiny_model("llama")), BATCHES[:steps], [monitor, table], root, **options)


def count_steps(file: Path) -> int:
    return len(set(pq.read_table(file)["step"].to_pylist()))


def test_the_table_of_another_run_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("heads.parquet", "heads-2.parquet", "heads-3.parquet")
    for steps, name in zip((3, 1, 2), names, strict=True):
        table = HeadTable()
        write_table(tmp_path, steps, table)
        assert table.heads_file == tmp_path / name
    assert [count_steps(tmp_path / name) for name in names] == [3, 1, 2]
    assert capsys.readouterr().out.count("heads.parquet is another run's") == 2
    assert not list(tmp_path.glob("*.partial"))


def test_a_run_that_goes_on_writes_its_own_table_again(tmp_path: Path) -> None:
    first, module = HeadTable(), OwnModule(tiny_model("llama"))
    monitor = HeadImportance(1, 1)
    trainer = fit(module, BATCHES[:2], [monitor, first], tmp_path)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    write_table(tmp_path, 2, HeadTable(), resume=tmp_path / "two.ckpt", max_epochs=2)
    assert count_steps(tmp_path / "heads.parquet") == 4
    assert not (tmp_path / "heads-2.parquet").exists()


def test_each_version_of_a_logger_has_a_table(tmp_path: Path) -> None:
    for version in (0, 1):
        logger = CSVLogger(tmp_path / "logs", name="mine")
        write_table(tmp_path, 1 + version, HeadTable(), logger=logger)
        file = tmp_path / "logs" / "mine" / f"version_{version}" / "heads.parquet"
        assert count_steps(file) == 1 + version
    assert not (tmp_path / "heads.parquet").exists()


def test_a_path_is_written_to_and_what_it_replaces_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine" / "h.parquet"
    write_table(tmp_path, 1, HeadTable(str(file)))
    assert "replaced" not in capsys.readouterr().out
    write_table(tmp_path, 2, HeadTable(file))
    assert count_steps(file) == 2
    assert f"{file} was there before, and is replaced" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*.parquet")) == [file]


@pytest.mark.parametrize("path", [5, ["a"], "."])
def test_what_is_no_path_of_a_file(path: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        HeadTable(path)
    assert caught.value.key == "head_table.path"
    assert caught.value.given == path


def test_a_path_below_a_file_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as caught:
        write_table(tmp_path, 1, HeadTable(tmp_path / "file" / "heads.parquet"))
    assert caught.value.key == "head_table.path"
    assert "cannot be written to" in caught.value.problem
