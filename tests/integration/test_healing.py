"""Healing an earlier run's export: what the recipes `heal_lm` and `heal_distill` are for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from surgery.training.module import SurgeryModule
from surgery.training.rate import compute_batch_share, compute_loss_share
from tests.integration.summaries import read_summary

SHORT = (
    "data.seq_len=64",
    "data.batch_size=4",
    "measure.windows=4",
    "measure.prefill_tokens=32",
    "measure.decode_tokens=2",
    "measure.repeats=1",
    "report.prompts=[]",
    "logger=csv",
    "trainer.accelerator=cpu",
)
QUICK = (*SHORT, "trainer.max_steps=3")
# One that its config can say, and one with removed attention and counts of its own per layer.
FIRST = {
    "native": ("attention=[gqa]", "attention.gqa.kv_heads=2"),
    "record": (
        "attention=[prune_heads]",
        "attention.prune_heads.remove_attention=true",
        "attention.prune_heads.heads={0: [0,1,2,3,4,5,6,7], 2: [1], 3: [5,6]}",
    ),
}


@pytest.fixture(params=FIRST)
def export(
    request: pytest.FixtureRequest, cli: Callable[..., Any], tmp_path: Path
) -> tuple[Path, str]:
    run = tmp_path / "first"
    outcome = cli(*FIRST[request.param], "stages=[operate,export]", f"hydra.run.dir={run}")
    assert outcome.code == 0, outcome.err
    return run / "export", request.param


def test_by_the_text(export: tuple[Path, str], cli: Callable[..., Any], tmp_path: Path) -> None:
    path, kind = export
    outcome = cli("+recipe=heal_lm", f"model.path={path}", *QUICK, f"hydra.run.dir={tmp_path}")
    assert outcome.code == 0, outcome.err
    summary = read_summary(tmp_path)
    assert summary["export"]["format"] == kind
    assert summary["planned"]["before"]["parameters"] == summary["before"]["parameters"]
    training = summary["training"]
    assert training["trainable_parameters"] == summary["before"]["parameters"]
    said = {
        key: training[key] for key in ("objective", "attention_weight", "teacher", "parameters")
    }
    assert said == {
        "objective": "lm",
        "attention_weight": 0.0,
        "teacher": None,
        "parameters": "all",
    }


def test_by_the_original(export: tuple[Path, str], cli: Callable[..., Any], tmp_path: Path) -> None:
    """Attention alone is trained and matched; nothing is measured, so training loads the model."""
    path, kind = export
    outcome = cli(
        "+recipe=heal_distill",
        f"model.path={path}",
        "objective.teacher=embedded",
        "objective=distill_attention",
        "optim.parameters=attention",
        "stages=[train,export]",
        *QUICK,
        "trainer.log_every_n_steps=1",
        f"hydra.run.dir={tmp_path}",
    )
    assert outcome.code == 0, outcome.err
    summary = read_summary(tmp_path)
    assert summary["export"]["format"] == kind
    training = summary["training"]
    said = {
        key: training[key] for key in ("objective", "attention_weight", "teacher", "parameters")
    }
    assert said == {
        "objective": "distill",
        "attention_weight": 1.0,
        "teacher": "embedded",
        "parameters": "attention",
    }
    assert "train/attention" in (tmp_path / "metrics.csv").read_text().splitlines()[0]
    before, after = (load_file(p / "model.safetensors") for p in (path, tmp_path / "export"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "_proj" in name and "mlp" not in name}
    assert training["trainable_parameters"] == sum(before[name].numel() for name in moved)
    module = SurgeryModule.load_from_checkpoint(tmp_path / "checkpoints/last.ckpt")
    assert module.model is not None
    kept = module.model.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in after.items())


def test_the_rate_follows_from_what_the_first_run_cost(
    export: tuple[Path, str], cli: Callable[..., Any], tmp_path: Path
) -> None:
    """The teacher's loss beside the model's says it, as if both runs were one."""
    path, _ = export
    outcome = cli("model.path=embedded", *SHORT, "stages=[measure]", f"hydra.run.dir={tmp_path}")
    assert outcome.code == 0, outcome.err
    original = read_summary(tmp_path)["before"]["loss"]
    outcome = cli(
        "+recipe=heal_distill",
        f"model.path={path}",
        "objective.teacher=embedded",
        "stages=[measure,train]",
        *SHORT,
        "trainer.max_steps=1",
        f"hydra.run.dir={tmp_path / 'healed'}",
    )
    assert outcome.code == 0, outcome.err
    summary = read_summary(tmp_path / "healed")
    cut = summary["before"]["loss"]
    assert summary["training"]["rate"] == {
        "share": pytest.approx(compute_loss_share(original, cut) * compute_batch_share(4 * 64)),
        "reason": f"the held-out loss is {cut:.4f}, the teacher's {original:.4f}; 256 tokens a "
        "step",
    }


def test_a_record_can_be_operated_on_again(
    export: tuple[Path, str], cli: Callable[..., Any], tmp_path: Path
) -> None:
    """The plan is made for the model that the record tells of, not for its config's."""
    path, kind = export
    outcome = cli(
        "attention=[gqa]",
        "attention.gqa.kv_heads=1",
        "attention.gqa.layers=[1]",
        f"model.path={path}",
        "stages=[plan,operate,export]",
        f"hydra.run.dir={tmp_path}",
    )
    assert outcome.code == 0, outcome.err
    saved = load_file(tmp_path / "export" / "model.safetensors")
    layer = 1 if kind == "native" else 2  # sites are counted, and the record's first layer has none
    assert saved[f"model.layers.{layer}.self_attn.k_proj.weight"].shape == (32, 256)
