"""The pruning benchmark: its runs compose, its clock counts attention inside the whole."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra

import surgery.hydra  # noqa: F401
from benchmarks.pruning.clock import paired
from benchmarks.pruning.page import page
from benchmarks.pruning.runs import RUNS, P, S, command
from surgery.config.validate import check_config
from surgery.lab.report.summary import describe_machine, find_versions
from surgery.plan.registry import parse_operations
from tests.tiny_models import tiny_model

ORIGINAL = {"loss": 1.0, "parameters": 100, "kv_bytes_per_token": 80, "attention_flops": 1000}
SMALLER = {"parameters": 90, "kv_bytes_per_token": 48, "attention_flops": 600}


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_every_run_is_a_configuration_of_its_own(run: Any, tmp_path: Any) -> None:
    GlobalHydra.instance().clear()
    overrides = command(run, 5, 3, tmp_path)[2:]
    with initialize_config_module("surgery.conf", version_base="1.3"):
        cfg = compose("config", overrides=[*overrides, "run_dir=somewhere"])
    found = check_config(cfg)
    parse_operations(found.attention)
    assert found.trainer["max_steps"] == 5
    assert found.data.batch_size * found.data.seq_len == 8 * 512
    assert found.seed == 3


def _run(name: str, group: str, loss: float, opened: float | None = 1.2) -> dict[str, Any]:
    after = {"loss": loss, **SMALLER}
    return {
        "name": name,
        "group": group,
        "what": "w",
        "seed": 0,
        "before": ORIGINAL,
        "opened": opened,
        "after": after,
        "planned": SMALLER,
        "format": "record",
    }


def _page(*runs: dict[str, Any]) -> str:
    return page(
        {
            "runs": list(runs),
            "steps": 260,
            "share": 0.1,
            "command": "c",
            "machine": describe_machine(),
            "versions": find_versions(),
        }
    )


@pytest.mark.parametrize(("loss", "verdict"), [(1.009, "met"), (1.011, "missed")])
def test_the_verdict_follows_the_figures(loss: float, verdict: str) -> None:
    text = _page(_run("recipe", P, loss), _run("random", P, 1.5))
    assert f"ends {loss - 1:+.2%} from the original; asked for was 1%, {verdict}" in text
    assert text.index("| recipe |") < text.index("| random |")
    assert "are what the plan had said" in text
    assert "(-40%)" in text


def test_a_model_that_is_not_what_was_planned_is_said(tmp_path: Any) -> None:
    run = _run("recipe", P, 1.0)
    run["planned"] = {**SMALLER, "attention_flops": 599}
    assert "not what the plan had said" in _page(run)


def test_from_scratch_is_held_against_the_original() -> None:
    scratch = _run("from scratch", S, 1.4, opened=None)
    scratch["before"] = {**ORIGINAL, "loss": 5.6}
    text = _page(scratch, _run("distil", S, 1.1))
    assert "| from scratch | w | 0 | 1.0000 |  | 1.4000 | +40.0%" in text
    assert "the best is distil with 1.1000, the last from scratch with 1.4000" in text


def test_the_clock_counts_attention_inside_the_whole() -> None:
    model = tiny_model("llama").eval()
    timed = paired({"original": model, "same": copy.deepcopy(model)}, 2, 16, rounds=3)
    for parts in timed["ms"].values():
        assert 0 < parts["attention"] < parts["whole"]
    assert set(timed["speedup"]) == {"attention", "whole"}
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.is_grad_enabled()
