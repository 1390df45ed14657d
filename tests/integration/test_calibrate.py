"""The stage `calibrate`, from the command line: what it decides, keeps, hands on and refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import surgery
from surgery.models.source import find_embedded_dir
from surgery.training.module import SurgeryModule
from tests.integration.summaries import read_summary

SMALL = (
    "data.seq_len=64",
    "data.batch_size=4",
    "measure.windows=8",
    "measure.prefill_tokens=32",
    "measure.decode_tokens=2",
    "measure.repeats=1",
    "report.prompts=[]",
    "logger=csv",
    "trainer.accelerator=cpu",
    "calibration.windows=8",
    "calibration.batch_size=4",
    "calibration.refine_steps=4",
    "calibration.joint_steps=2",
    "calibration.rows=16",
)
OPTIMAL = (
    "attention=[gqa]",
    "attention.gqa.kv_heads=2",
    "attention.gqa.merge=optimal",
    "attention.gqa.grouping=similarity",
)


@pytest.fixture(scope="module")
def healed(process: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("optimal")
    outcome = process(
        "+recipe=gqa_optimal",
        *SMALL,
        "trainer.max_steps=2",
        "validation.keep=last",  # what the last checkpoint holds
        f"hydra.run.dir={where}",
        cwd=where,
    )
    assert outcome.code == 0, outcome.err
    (where / "stdout").write_text(outcome.out)
    return where


def test_the_recipe_says_what_was_decided_and_on_what(healed: Path) -> None:
    summary = read_summary(healed)
    calibration = summary["calibration"]
    assert calibration["batches"] == 2
    assert calibration["tokens"] == 8 * 64
    (sites,) = [entry["sites"] for entry in calibration["operations"]]
    assert len(sites) == 4
    for figures in sites.values():
        assert sorted(h for group in figures["groups"] for h in group) == list(range(8))
        assert figures["output_refined"] <= figures["output_closed_form"]
    out = (healed / "stdout").read_text()
    assert "left open" in out
    assert "== calibrate" in out
    assert "calibration: done" in out


def test_a_checkpoint_needs_no_coefficients(healed: Path) -> None:
    module = SurgeryModule.load_from_checkpoint(healed / "checkpoints" / "last.ckpt")
    exported = AutoModelForCausalLM.from_pretrained(healed / "export", dtype=torch.float32)
    theirs = exported.state_dict()
    assert module.model is not None
    for name, tensor in module.model.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


def test_the_plan_on_disk_gives_the_bits_of_the_run(
    healed: Path, cli: Callable[..., Any], tmp_path: Path
) -> None:
    for name, stages in (("kept", "[plan,calibrate]"), ("whole", "[calibrate,operate,export]")):
        outcome = cli(*OPTIMAL, *SMALL, f"stages={stages}", f"hydra.run.dir={tmp_path / name}")
        assert outcome.code == 0, outcome.err
    plan = surgery.load_plan(tmp_path / "kept")
    assert plan.is_resolved
    model = AutoModelForCausalLM.from_pretrained(find_embedded_dir(), dtype=torch.float32)
    model = surgery.apply_(model, plan)
    exported = load_file(tmp_path / "whole" / "export" / "model.safetensors")
    mine = model.state_dict()
    for name, tensor in exported.items():
        assert torch.equal(tensor, mine[name]), name


def test_operating_without_it_is_refused(cli: Callable[..., Any], tmp_path: Path) -> None:
    outcome = cli(*OPTIMAL, *SMALL, "stages=[plan,operate,export]", f"hydra.run.dir={tmp_path}")
    assert outcome.code == 2
    assert "stages" in outcome.err
    assert "add `calibrate`" in outcome.err
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("kept", ["auto", "native"])
def test_a_budget_within_what_the_export_can_say(
    kept: str, cli: Callable[..., Any], tmp_path: Path
) -> None:
    outcome = cli(
        "attention=[gqa]",
        "attention.gqa.kv_heads={average:3}",
        *SMALL,
        f"export.format={kept}",
        "calibration.refine_steps=0",
        "stages=[plan,calibrate,operate,export]",
        f"hydra.run.dir={tmp_path}",
    )
    assert outcome.code == 0, outcome.err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    counts = [site.kv_heads for site in surgery.find_sites(model).sites]
    assert sum(counts) <= 12
    if kept == "native":
        assert counts == [2, 2, 2, 2]
        assert read_summary(tmp_path)["export"]["format"] == "native"
    else:
        assert sum(counts) > 8  # more than the most that all can have: the budget is used


def test_a_result_that_needs_a_record_is_refused_where_native_is_asked_for(
    cli: Callable[..., Any], tmp_path: Path
) -> None:
    outcome = cli(
        "attention=[gqa]",
        "attention.gqa.kv_heads=[8,4,4,2]",
        "export.format=native",
        "stages=[plan]",
        f"hydra.run.dir={tmp_path}",
    )
    assert outcome.code == 2
    assert "export.format" in outcome.err
    assert "one KV head count" in outcome.err


def test_a_model_that_optimal_is_not_for_is_averaged_all_the_same(
    cli: Callable[..., Any], tmp_path: Path
) -> None:
    outcome = cli(
        "+recipe=gqa_convert",
        *SMALL,
        "model=tiny_llama",
        "model.scratch.model_type=olmo2",
        "model.scratch.hidden_size=64",
        "model.scratch.num_hidden_layers=2",
        "trainer.max_steps=1",
        f"hydra.run.dir={tmp_path}",
    )
    assert outcome.code == 0, outcome.err
    assert "merge=optimal is not for this model" in outcome.out
    assert "taken over all heads together" in outcome.out
    summary = read_summary(tmp_path)
    assert summary["comparison"] is None
    assert summary["after_training"] is not None
