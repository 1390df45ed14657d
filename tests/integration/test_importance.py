"""Importance from the command line: score table, picture, and pruning that decides on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

import surgery
from surgery.importance.table import ScoreTable
from tests.integration.summaries import read_summary
from tests.wandb_records import read_records

TINY = (
    "model=tiny_llama",
    "model.scratch.hidden_size=32",
    "model.scratch.intermediate_size=48",
    "model.scratch.num_hidden_layers=2",
    "model.scratch.num_attention_heads=4",
    "model.scratch.num_key_value_heads=4",
    "data.seq_len=32",
    "data.batch_size=4",
    "measure.windows=4",
    "measure.prefill_tokens=16",
    "measure.decode_tokens=2",
    "measure.repeats=1",
    "report.prompts=[]",
    "trainer.accelerator=cpu",
    "importance.windows=8",
    "importance.batch_size=4",
    "calibration.windows=8",
    "calibration.batch_size=4",
)


def test_the_recipe_leaves_a_table_for_scripts_people_and_dashboards(
    cli: Callable[..., Any], tmp_path: Path
) -> None:
    outcome = cli("+recipe=head_importance", *TINY, f"hydra.run.dir={tmp_path}")
    assert outcome.code == 0, outcome.err
    table = ScoreTable.from_json(json.loads((tmp_path / "importance.json").read_text()))
    assert [len(site.scores) for site in table.get_scores("heads")] == [4, 4]
    assert pq.read_table(tmp_path / "importance.parquet").num_rows == 2 * 4 * 2
    assert (tmp_path / "importance.png").stat().st_size > 0
    assert read_summary(tmp_path)["importance"] == table.describe()
    assert "Importance by leave one out" in outcome.out
    records = read_records(tmp_path)
    artifacts = [record["artifact"] for record in records if record["type"] == "artifact"]
    (artifact,) = [one for one in artifacts if one["type"] == "head-scores"]
    held = {entry["path"] for entry in artifact["manifest"]["contents"]}
    assert held == {"importance.json", "importance.parquet"}
    assert json.loads(artifact["metadata"]) == table.describe()
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/head_scores_*.png"))) == 1


def test_the_table_of_one_run_prunes_in_the_next(cli: Callable[..., Any], tmp_path: Path) -> None:
    scored = cli("+recipe=head_importance", *TINY, "logger=none", f"hydra.run.dir={tmp_path / 'a'}")
    assert scored.code == 0, scored.err
    common = (
        "attention=[prune_heads]",
        "attention.prune_heads.amount=0.5",
        "logger=none",
        "stages=[plan,calibrate,operate,export]",
        *TINY,
    )
    by_file = cli(
        *common,
        f"attention.prune_heads.scores={tmp_path / 'a' / 'importance.json'}",
        f"hydra.run.dir={tmp_path / 'b'}",
    )
    by_name = cli(
        *common, "attention.prune_heads.estimator=leave_one_out", f"hydra.run.dir={tmp_path / 'c'}"
    )
    assert by_file.code == 0, by_file.err
    assert by_name.code == 0, by_name.err
    table = ScoreTable.from_json(json.loads((tmp_path / "a" / "importance.json").read_text()))
    plan = surgery.load_plan(tmp_path / "c")
    for change, site in zip(plan.changes, table.get_scores("heads"), strict=True):
        lost = sorted(range(4), key=lambda head: (site.scores[head], head))[:2]
        assert {head for (head,) in change.query} == set(range(4)) - set(lost)
    first, second = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "export").state_dict()
        for name in "bc"
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert read_summary(tmp_path / "c")["importance"]["estimator"] == "leave_one_out"


@pytest.mark.parametrize(
    ("given", "key"),
    [
        (("importance.estimator=michel",), "importance.estimator"),
        (("importance.objective=distill",), "importance.objective"),
        (("importance.windows=0",), "importance.windows"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    given: tuple[str, ...], key: str, cli: Callable[..., Any], tmp_path: Path
) -> None:
    outcome = cli(
        "+recipe=head_importance",
        "importance.estimator=gate_gradient",
        *TINY,
        *given,
        f"hydra.run.dir={tmp_path}",
    )
    assert outcome.code == 2
    assert key in outcome.err
    assert not (tmp_path / "importance.json").exists()


def test_an_estimator_is_refused_before_anything_is_measured(
    cli: Callable[..., Any], tmp_path: Path
) -> None:
    outcome = cli(
        "attention=[prune_heads]",
        "attention.prune_heads.amount=0.5",
        "attention.prune_heads.estimator=gate_gradient",
        "importance.objective=distill",
        *TINY,
        "logger=none",
        f"hydra.run.dir={tmp_path}",
    )
    assert outcome.code == 2
    assert "importance.objective" in outcome.err
    assert "measure" not in outcome.out
    assert not (tmp_path / "plan.json").exists()
