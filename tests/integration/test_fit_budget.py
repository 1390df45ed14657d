"""A run with a declared target, and one that shows what could be chosen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.summaries import read_summary

SMALL = (
    "data.seq_len=64",
    "calibration.windows=8",
    "calibration.batch_size=4",
    "calibration.refine_steps=3",
    "calibration.joint_steps=2",
    "calibration.rows=16",
    "measure.windows=4",
    "measure.prefill_tokens=32",
    "measure.decode_tokens=2",
    "measure.repeats=1",
    "report.prompts=[]",
    "logger=csv",
    "trainer.accelerator=cpu",
    "attention.fit_budget.choices=[gqa]",
)


@pytest.fixture(scope="module")
def front(process: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("front")
    outcome = process("+recipe=fit_front", *SMALL, f"hydra.run.dir={where}", cwd=where)
    assert outcome.code == 0, outcome.err
    return where


def test_the_front_is_shown(front: Path) -> None:
    found = read_summary(front)["calibration"]["chosen"]["front"]
    assert [point["share"] for point in found] == [0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875]
    assert (front / "front.png").read_bytes().startswith(b"\x89PNG")
    page = (front / "report.html").read_text()
    for words in ("Loss against cost", "KL with one layer changed", "50% of kv_bytes"):
        assert words in page
    assert not (front / "export").exists()


def test_a_second_target_scores_nothing_and_is_healed(
    front: Path, cli: Callable[..., Any], tmp_path: Path
) -> None:
    """The plan names the operations that were chosen; what follows is as for any other."""
    outcome = cli(
        "+recipe=fit_budget",
        *SMALL,
        "attention.fit_budget.target={kv_bytes:0.25}",
        "attention.fit_budget.rounds=0",
        f"attention.fit_budget.scores={front / 'plan.json'}",
        "trainer.max_steps=2",
        f"hydra.run.dir={tmp_path}",
    )
    assert outcome.code == 0, outcome.err
    assert "what each layer may become" not in outcome.out
    summary = read_summary(tmp_path)
    assert [spec["operation"] for spec in summary["operations"]] == ["gqa"]
    before, after = (summary[m]["kv_bytes_per_token"] for m in ("before", "after_training"))
    assert after <= before / 4
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert [spec["operation"] for spec in plan["operations"]] == ["gqa"]
    assert (tmp_path / "export" / "model.safetensors").is_file()


def test_a_target_out_of_reach_is_refused(cli: Callable[..., Any], tmp_path: Path) -> None:
    outcome = cli(
        "+recipe=fit_budget",
        *SMALL,
        "attention.fit_budget.target={kv_bytes:0.1}",
        f"hydra.run.dir={tmp_path}",
    )
    assert outcome.code == 2
    assert "attention.fit_budget.target.kv_bytes: cannot be reached" in outcome.err
    assert "at least 0.125" in outcome.err
    assert not (tmp_path / "plan.json").exists()
