"""Healing that does not help is said, and what it had at its best is what comes out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from surgery.config.validate import check_config
from surgery.data.module import TextData
from surgery.measure.loss import compute_mean_loss
from surgery.models.source import ModelSource
from tests.integration.summaries import read_summary
from tests.integration.test_healing import SHORT
from tests.integration.test_pruning_schedules import RECIPE, SCHEDULE

GQA = ("attention=[gqa]", "attention.gqa.kv_heads=4", *SHORT, "validation.windows=4")
EMA = (
    "+callbacks.average._target_=pytorch_lightning.callbacks.EMAWeightAveraging",
    "+callbacks.average.decay=0.9",
)


def measure_last_windows(run: Path, export: Path, windows: int) -> float:
    """Measure the held-out loss of an export on the windows that a validation looks at."""
    cfg = check_config(OmegaConf.load(run / "config.yaml"))
    model = AutoModelForCausalLM.from_pretrained(export)
    tokenizer = ModelSource(cfg.model).load_tokenizer()
    data = TextData(cfg.data, tokenizer, cfg.model.task, cfg.seed)
    data.validation_windows = windows
    assert data.count_shared_rows(cfg.measure.windows) == 0
    batches = data.load_validation_batches(1)
    return compute_mean_loss(model, batches, cfg.model.task, total=windows, label="by hand")


def test_the_untrained_weights_come_out_of_harmful_healing(
    cli: Callable[..., Any], tmp_path: Path
) -> None:
    """One call: everything that a person or a script may look at says the same."""
    run, untrained = tmp_path / "run", tmp_path / "untrained"
    outcome = cli(
        *GQA,
        "trainer.max_steps=12",
        "optim.lr=0.5",
        "optim.warmup_steps=0",
        f"hydra.run.dir={run}",
    )
    assert outcome.code == 0, outcome.err
    summary = read_summary(run)
    healed = summary["training"]["held_out"]
    losses = healed.pop("losses")
    assert [step for step, _ in losses] == [0, 10, 12]
    assert healed == {
        "every_n_steps": 10,
        "windows": 4,
        "first_step": 0,
        "best_step": 0,
        "best_loss": losses[0][1],
        "last_loss": losses[-1][1],
        "kept": "best",
        "kept_step": 0,
    }
    assert healed["last_loss"] > healed["best_loss"] + 0.1
    # Other windows than those that are measured.
    opened = summary["after_surgery"]["loss"]
    assert losses[0][1] != pytest.approx(opened, rel=1e-3)
    assert losses[0][1] == pytest.approx(measure_last_windows(run, run / "export", 4), rel=1e-5)
    assert summary["after_training"]["loss"] == pytest.approx(opened, rel=1e-6)
    said = "healing did not help; the untrained weights are exported"
    for text in (
        outcome.out,
        (run / "report.html").read_text(),
        (run / "export/README.md").read_text(),
    ):
        assert said in " ".join(text.replace("Healing", "healing").split())
    assert "every 10 steps and at the end, on 4 of" in outcome.out
    outcome = cli(*GQA, "stages=[operate,export]", f"hydra.run.dir={untrained}")
    assert outcome.code == 0, outcome.err
    left, right = (load_file(place / "export" / "model.safetensors") for place in (run, untrained))
    assert left.keys() == right.keys()
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())
    # The checkpoint to resume from is that of the last step.
    last = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert last["global_step"] == 12
    assert not torch.equal(last["state_dict"][f"model.{name}"], left[name])


def test_the_last_weights_where_they_are_wanted(cli: Callable[..., Any], tmp_path: Path) -> None:
    outcome = cli(
        *GQA,
        "stages=[operate,train]",
        "validation.keep=last",
        "data.batch_size=3",
        "trainer.limit_val_batches=1",
        "trainer.max_steps=2",
        "optim.lr=0.5",
        "optim.warmup_steps=0",
        "trainer.enable_checkpointing=false",
        "callbacks.checkpoint=null",
        f"hydra.run.dir={tmp_path}",
    )
    assert outcome.code == 0, outcome.err
    assert "healing ended worse than it began" in outcome.out
    assert "validation.keep=best keeps such weights" in outcome.out
    healed = read_summary(tmp_path)["training"]["held_out"]
    assert (healed["kept"], healed["kept_step"], healed["best_step"]) == ("last", 2, 0)
    assert healed["windows"] == 3
    assert not (tmp_path / "best.safetensors").exists()


@pytest.mark.parametrize("gradual", [False, True])
def test_averaged_weights_are_exported(
    gradual: bool, cli: Callable[..., Any], tmp_path: Path
) -> None:
    """Averaging rounds what is computed; the export reloads to the same model all the same."""
    what = (*RECIPE, f"{SCHEDULE}=gradual") if gradual else (*GQA, "trainer.max_steps=3")
    outcome = cli(*what, *EMA, "stages=[operate,train,export]", f"hydra.run.dir={tmp_path}")
    assert outcome.code == 0, outcome.err
    summary = read_summary(tmp_path)
    assert summary["export"]["max_logit_difference_after_reload"] <= 1e-6
    first = summary["training"]["held_out"]["first_step"]
    assert first == (6 if gradual else 0)  # gradual: all heads are closed at step 3


def test_two_cadences_are_refused(cli: Callable[..., Any], tmp_path: Path) -> None:
    outcome = cli(
        "validation.every_n_steps=5", "trainer.val_check_interval=3", f"hydra.run.dir={tmp_path}"
    )
    assert outcome.code == 2
    assert "validation.every_n_steps" in outcome.err
    assert "trainer.val_check_interval" in outcome.err


def test_no_held_out_loss_is_said(cli: Callable[..., Any], tmp_path: Path) -> None:
    outcome = cli(
        *GQA,
        "stages=[operate,train]",
        "trainer.max_steps=1",
        "trainer.limit_val_batches=0",
        f"hydra.run.dir={tmp_path}",
    )
    assert outcome.code == 0, outcome.err
    assert "trainer.limit_val_batches=0: no held-out loss is looked at" in outcome.out
    assert read_summary(tmp_path)["training"]["held_out"] is None
