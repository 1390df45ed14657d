"""Real offline runs, read back from W&B's own files: which names, which steps, made from what."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import wandb

from surgery.lab.dashboard import names
from surgery.training.identity import compute_fingerprint
from tests.lab.dashboard import reading
from tests.wandb_records import read_records

ROOT = Path(__file__).parents[3]
STEPS = 5
EVERY = list(range(STEPS))
HEALING = (
    "stages=[plan,measure,score,operate,train,export,report]",
    "attention=[prune_heads]",
    "attention.prune_heads.amount=0.25",
    "attention.prune_heads.estimator=gate_gradient",
    "attention.prune_heads.schedule=gradual",
    "objective=distill",
    "objective.label_weight=0.5",
    "objective.attention_weight=0.1",
    "trainer.val_check_interval=2",
    "trainer.limit_val_batches=1",
    "callbacks.head_importance.every_n_steps=1",
    "callbacks.head_importance.heatmap_every_n_steps=2",
    "callbacks.attention_statistics.every_n_steps=2",
    "callbacks.attention_statistics.heatmap_every_n_steps=8",
    "logger.kinds=[wandb,csv]",
)
CONVERTING = (
    "stages=[plan,measure,operate,export]",
    "attention=[gqa]",
    "attention.gqa.kv_heads=2",
    "logger.upload_export=true",
)
Records = list[dict[str, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return reading.model_and_text(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def go(
    model: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, Records]]:
    def run(*overrides: str) -> tuple[Path, Records]:
        folder = tmp_path_factory.mktemp("run")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WANDB_SILENT", "true")
            reading.go(folder, *model, *overrides)
        return folder, read_records(folder)

    return run


@pytest.fixture(scope="module")
def healed(go: Callable[..., Any]) -> tuple[Path, Records]:
    return go(*HEALING)


@pytest.fixture(scope="module")
def converted(go: Callable[..., Any]) -> tuple[Path, Records]:
    return go(*CONVERTING)


def expected() -> dict[str, list[int]]:
    """Name → steps, by the names of `surgery.lab.dashboard` and the cadences above."""
    training = (names.LOSS, *names.PARTS, names.OPEN_HEADS, "lr-AdamW/pg1", "lr-AdamW/pg2")
    steps = dict.fromkeys(training, EVERY) | {names.HELD_OUT: [0, 1, 3, STEPS]}
    for metric in names.HEADS:
        mine = metric == names.IMPORTANCE
        steps[names.name_over_heads(metric)] = EVERY if mine else [0, 2, 4]
        steps[names.name_heatmap(metric)] = [0, 2, 4] if mine else [0]
    for metric, kinds in names.PER_LAYER.items():
        for name in (
            names.name_of_layer(metric, n, w) for n in range(reading.LAYERS) for w in kinds
        ):
            steps[name] = steps[names.name_over_heads(metric)]
    steps |= {names.name_alarm(kind): [0, 2, 4] for kind in names.ALARMS}
    once = [STEPS]  # after the last validation
    return steps | {names.SCORE_TABLE: once, names.SCORE_PICTURE: once}


def documented() -> list[str]:
    """Patterns of the names in the table "What is logged" of docs/outputs.md."""
    text = (ROOT / "docs/outputs.md").read_text(encoding="utf-8")
    table = text.split("## What is logged")[1].split("\n## ")[0]
    patterns = []
    for line in table.splitlines():
        for name in re.findall(r"`([^`]+)`", line.split("|")[1]) if line.startswith("| `") else ():
            if name.startswith("…/"):  # the last segment of the name before it, exchanged
                name = f"{patterns[-1].rpartition('/')[0]}/{name[2:]}"
            pattern = name.replace("layer_NN", r"layer_\d\d")
            patterns.append(pattern.replace("METRIC", f"({'|'.join(names.HEADS)})"))
    return patterns


def test_every_name_is_there_with_its_steps(healed: tuple[Path, Records]) -> None:
    logged = reading.history(healed[1])
    assert logged == expected()
    per_head = names.count_charts(reading.LAYERS)
    assert (
        sum(name.split("/")[0] in names.HEADS and not name.endswith("/heads") for name in logged)
        == per_head
    )


def test_the_docs_name_what_is_logged_and_nothing_else(healed: tuple[Path, Records]) -> None:
    logged, patterns = reading.history(healed[1]), documented()
    known = {*logged, names.TASKS_PICTURE}
    assert len(patterns) > 10
    for pattern in patterns:
        assert any(re.fullmatch(pattern, name) for name in known), pattern
    for name in known:
        assert any(re.fullmatch(pattern, name) for pattern in patterns), name


def test_every_logger_has_the_same_scalars(healed: tuple[Path, Records]) -> None:
    with (healed[0] / "metrics.csv").open() as file:
        columns = set(csv.DictReader(file).fieldnames or ())
    pictures = {names.name_heatmap(metric) for metric in names.HEADS}
    once = {names.SCORE_TABLE, names.SCORE_PICTURE}
    assert columns - {"step", "epoch"} == set(reading.history(healed[1])) - pictures - once


def test_the_summary_is_flat_and_says_what_summary_json_does(healed: tuple[Path, Records]) -> None:
    folder, records = healed
    kept = json.loads((folder / "summary.json").read_text())
    sent = reading.summary(records)
    ours = {key: value for key, value in sent.items() if key in names.RESULT}
    assert {key for key in sent if key.startswith("result/")} <= set(names.RESULT)
    assert ours["result/loss_before"] == kept["before"]["loss"]
    assert ours["result/loss"] == ours["result/loss_after_training"]
    assert ours["result/loss"] == kept["after_training"]["loss"]
    for key in ("parameters", "kv_bytes_per_token", "attention_flops", "prefill_ms"):
        assert ours[f"result/{key}"] == kept["after_training"][key]
    assert ours["result/kv_bytes_share"] == 0.75
    assert (ours["result/steps"], ours["result/tokens"]) == (STEPS, STEPS * 2 * 32)
    assert (ours["operations"], ours["export"]) == ("prune_heads", "native")
    assert all(isinstance(value, (int, float, str)) for value in ours.values())


def test_the_config_is_the_run_s_own_with_the_rate_that_was_used(
    healed: tuple[Path, Records],
) -> None:
    (config,) = [r["run"]["config"]["update"] for r in healed[1] if r["type"] == "run"]
    # The config says null.
    trained = json.loads((healed[0] / "summary.json").read_text())["training"]
    assert config["optim"]["lr"] == trained["lr"] > 0
    assert config["attention"]["prune_heads"]["amount"] == 0.25
    # Nothing comes on top: a large model's plan has thousands of lines.
    later = [r["config"]["update"] for r in healed[1] if r["type"] == "config"]
    assert all(set(update) <= {"_wandb"} for update in later)


def test_lineage_leads_from_the_original_to_the_export(healed: tuple[Path, Records]) -> None:
    folder, records = healed
    made = reading.artifacts(records)
    original, plan, export = (made[name] for name in ("original-model", "plan", "export"))
    kinds = [one["type"] for one in (original, plan, export)]
    assert kinds == ["model", "plan", "model"]
    assert set(original["files"]) == {"original.json"}
    assert json.loads(Path(original["files"]["original.json"]).read_text()) == original["metadata"]
    links = [{"name": one["name"], "digest": one["digest"]} for one in (original, plan)]
    assert plan["metadata"]["made_from"] == links[:1]
    assert export["metadata"]["made_from"] == links
    assert set(export["files"]) == {"export.json"}  # no weights unless asked for
    assert export["metadata"]["fingerprint"] == compute_fingerprint(folder / "export")
    assert export["metadata"]["format"] == "native"
    sent = Path(plan["files"]["plan.json"]).read_text()
    assert sent == (folder / "plan.json").read_text()


def test_tables_are_whole(healed: tuple[Path, Records]) -> None:
    folder, records = healed
    made = reading.artifacts(records)
    for name, held in (("importance", "importance.parquet"), ("heads", "heads.parquet")):
        sent = pq.read_table(made[name]["files"][held])
        assert sent.equals(pq.read_table(folder / held))
    table = json.loads(Path(made["score_table"]["files"]["score_table.table.json"]).read_text())
    lines = pq.read_table(folder / "importance.parquet").to_pylist()
    heads = [list(line.values()) for line in lines if line["unit"] == "heads"]
    assert len(heads) == reading.LAYERS * 4
    assert table["data"] == heads
    assert table["columns"] == list(lines[0])


def test_a_run_without_training_has_lineage_and_result(
    healed: tuple[Path, Records], converted: tuple[Path, Records]
) -> None:
    folder, records = converted
    made = reading.artifacts(records)
    assert set(made) == {"original-model", "plan", "export"}
    # One version for all runs of a sweep.
    before = reading.artifacts(healed[1])["original-model"]
    assert made["original-model"]["digest"] == before["digest"]
    sent = made["export"]["files"]
    assert {"model.safetensors", "config.json", "export.json"} <= set(sent)
    assert (
        Path(sent["model.safetensors"]).read_bytes()
        == (folder / "export/model.safetensors").read_bytes()
    )
    summary = reading.summary(records)
    kept = json.loads((folder / "summary.json").read_text())
    assert summary["result/loss_after_surgery"] == kept["after_surgery"]["loss"]
    assert summary["operations"] == "gqa"
    assert not {"result/steps", "result/loss_after_training"} & set(summary)
    assert [r["exit"]["exit_code"] for r in records if r["type"] == "exit"] == [0]


def test_a_run_that_fails_is_ended_as_failed(
    model: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    fails = "+callbacks.fails._target_=tests.lab.dashboard.reading.Fails"
    with pytest.raises(RuntimeError, match="the second step"):
        reading.go(tmp_path, *model, "stages=[plan,train]", fails)
    assert wandb.run is None
    records = read_records(tmp_path)
    assert [r["exit"]["exit_code"] for r in records if r["type"] == "exit"] == [1]
    assert not [key for key in reading.summary(records) if key.startswith("result/")]


def test_wandb_writes_nothing_where_it_is_disabled(
    model: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    reading.go(tmp_path, *model, "stages=[plan,score,train]", "trainer.max_steps=1")
    assert (tmp_path / "heads.parquet").is_file()
    names = {path.name for path in tmp_path.iterdir()}
    assert not names & {"wandb", "data", "cache"}
    assert capsys.readouterr().out.count("W&B is off, and writes nothing: WANDB_MODE=disabled") == 1


@pytest.mark.parametrize("changes", [("logger=csv",), ("logger=none",), ("stages=[plan]",)])
def test_nothing_goes_to_wandb_unasked(
    model: tuple[str, ...], tmp_path: Path, changes: tuple[str, ...]
) -> None:
    reading.go(tmp_path, *model, "stages=[plan,measure]", *changes)
    assert (tmp_path / "summary.json").is_file()
    assert not (tmp_path / "wandb").exists()
