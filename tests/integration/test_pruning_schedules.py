"""Heads closed while a model trains, from the command line to a model that reloads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import surgery
from surgery.plan.store import load_plan
from surgery.training.module import SurgeryModule
from tests.integration.summaries import read_summary

# An architecture whose config can say any number of heads.
TINY = (
    "model=tiny_llama",
    "model.scratch.model_type=mistral",
    "model.scratch.hidden_size=32",
    "model.scratch.intermediate_size=48",
    "model.scratch.num_hidden_layers=2",
    "model.scratch.num_attention_heads=4",
    "model.scratch.num_key_value_heads=4",
    "+model.scratch.head_dim=8",
)
SMALL = (
    "data.seq_len=32",
    "data.batch_size=4",
    "measure.windows=4",
    "measure.prefill_tokens=16",
    "measure.decode_tokens=2",
    "measure.repeats=1",
    "report.prompts=[]",
    "logger=csv",
    "trainer.accelerator=cpu",
    "trainer.max_steps=6",
    "importance.windows=4",
    "importance.batch_size=2",
    "objective=lm",
)
RECIPE = (
    "+recipe=prune_heads",
    "attention.prune_heads.heads=null",
    "attention.prune_heads.scores=null",
    "attention.prune_heads.count=null",
    "attention.prune_heads.amount=0.5",
    "attention.prune_heads.estimator=gate_gradient",
    "attention.prune_heads.scope=layer",
    "attention.prune_heads.refit=false",
    "optim.warmup_steps=1",
    *TINY,
    *SMALL,
)
SCHEDULE = "attention.prune_heads.schedule"


def test_gradual_ends_in_an_ordinary_pruned_model(cli: Callable[..., Any], tmp_path: Path) -> None:
    outcome = cli(
        *RECIPE, f"{SCHEDULE}=gradual", "export.format=native", f"hydra.run.dir={tmp_path}"
    )
    assert outcome.code == 0, outcome.err
    summary = read_summary(tmp_path)
    decision = summary["training"]["decision"]
    (event,) = decision.pop("events")
    assert decision == {"schedule": "gradual", "estimator": "gate_gradient", "rounds": None}
    assert event["step"] == 3
    assert {layer: len(heads) for layer, heads in event["closed"].items()} == {"0": 2, "1": 2}
    assert summary["after_surgery"] is None
    assert summary["after_training"]["parameters"] == summary["planned"]["after"]["parameters"]
    assert summary["timings"]["cut"] >= 0
    for words in ("training decides which heads go", "heads closing until step 3", "== cut"):
        assert words in outcome.out
    plan = load_plan(tmp_path)
    assert plan.is_resolved
    assert plan.operations[-1]["heads"] == event["closed"]
    # The checkpoint is the gated model, the export the cut one: the same function.
    module = SurgeryModule.load_from_checkpoint(
        tmp_path / "checkpoints/last.ckpt", map_location="cpu", weights_only=True
    )
    assert module.model is not None
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export").double()
    assert exported.config.num_attention_heads == 2
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        gated, cut = (m.double().eval()(input_ids=ids).logits for m in (module.model, exported))
    assert (gated - cut).abs().max() <= 1e-6
    # And the plan alone makes this structure of the original.
    said = {"dtype": None, "architectures": None, "vocab_size": None}
    made = surgery.apply_(module.source.load(), plan).config.to_diff_dict() | said
    assert made == exported.config.to_diff_dict() | said


def test_the_original_teaches_what_becomes_of_it(cli: Callable[..., Any], tmp_path: Path) -> None:
    """Before training nothing is changed yet, and still the model does not learn from itself."""
    outcome = cli(
        "+recipe=prune_heads",
        "attention.prune_heads.refit=false",
        f"{SCHEDULE}=gradual",
        "attention.prune_heads.estimator=output_norm",
        "stages=[operate,train]",
        *SMALL,
        "objective=distill",
        "data.seq_len=16",
        "trainer.max_steps=2",
        "optim.warmup_steps=1",
        f"hydra.run.dir={tmp_path}",
    )
    assert outcome.code == 0, outcome.err
    (event,) = read_summary(tmp_path)["training"]["decision"]["events"]
    assert sum(map(len, event["closed"].values())) == 13


def test_iterative_after_a_calibrated_merge(cli: Callable[..., Any], tmp_path: Path) -> None:
    """The plans are joined: one leads from the original to the result, coefficients included."""
    outcome = cli(
        *RECIPE,
        "attention=[gqa,prune_heads]",
        "attention.gqa.kv_heads=2",
        "attention.gqa.merge=optimal",
        "attention.gqa.grouping=similarity",
        f"{SCHEDULE}=iterative",
        "attention.prune_heads.rounds=2",
        "attention.prune_heads.until=1.0",
        "attention.prune_heads.cut=queries",
        "calibration.windows=4",
        "calibration.batch_size=2",
        "calibration.refine_steps=2",
        "calibration.joint_steps=2",
        "objective=distill",
        "model.path=null",
        "objective.label_weight=0",
        "objective.teacher=embedded",
        f"hydra.run.dir={tmp_path}",
    )
    assert outcome.code == 0, outcome.err
    summary = read_summary(tmp_path)
    assert summary["after_surgery"] is not None
    events = summary["training"]["decision"]["events"]
    assert [event["step"] for event in events] == [0, 3]
    assert sum(len(heads) for e in events for heads in e["closed"].values()) == 4
    plan = load_plan(tmp_path)
    assert plan.is_resolved
    assert [spec["operation"] for spec in plan.operations] == ["gqa", "prune_heads"]
    assert plan.calibration is not None
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    shapes = {name: p.shape for name, p in exported.named_parameters()}
    module = SurgeryModule.load_from_checkpoint(tmp_path / "checkpoints/last.ckpt")
    made = surgery.apply_(module.source.load(), plan)
    assert {name: p.shape for name, p in made.named_parameters()} == shapes


REFUSED = {
    "stages": ("stages=[operate,export]",),
    "attention.prune_heads": ("attention=[prune_heads,gqa]", "attention.gqa.kv_heads=2"),
    "trainer.strategy": ("trainer=fsdp",),
    "optim.parameters": ("optim.parameters=changed",),
    "attention.prune_heads.rounds": (f"{SCHEDULE}=iterative", "attention.prune_heads.rounds=4"),
    "attention.prune_heads.estimator": ("attention.prune_heads.estimator=null",),
    "attention.prune_heads.amount": ("attention.prune_heads.amount=1.0",),
    "importance.objective": ("importance.objective=distill",),
}


@pytest.mark.parametrize("key", REFUSED)
def test_refused_before_anything_happens(cli: Callable[..., Any], tmp_path: Path, key: str) -> None:
    outcome = cli(*RECIPE, f"{SCHEDULE}=gradual", *REFUSED[key], f"hydra.run.dir={tmp_path}")
    assert outcome.code == 2
    assert f"{key}:" in outcome.err, outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "plan.json").exists()
