"""What a checkpoint does not continue is refused before any work, by the key that differs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.lab.dashboard.reading import QUICK, model_and_text
from tests.tiny_models import tiny_model

GQA = ("attention=[gqa]", "attention.gqa.kv_heads=2")
RUN = (
    *(one for one in QUICK if not one.startswith(("callbacks.checkpoint", "trainer.max_steps"))),
    "stages=[plan,calibrate,operate,train]",
    "trainer.max_steps=2",
    "callbacks.checkpoint.every_n_train_steps=1",
    "logger=none",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return model_and_text(tmp_path_factory.mktemp("model"))


@pytest.fixture
def go(model: tuple[str, ...], cli: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *overrides: cli(*model, *RUN, *overrides)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints by name; the first test that needs one makes it."""
    return {"folder": tmp_path_factory.mktemp("kept")}


@pytest.fixture
def checkpoints(go: Callable[..., Any], kept: dict[str, Path], model: tuple[str, ...]) -> Path:
    folder = kept["folder"]
    if "run" not in kept:
        outcome = go(*GQA, f"hydra.run.dir={folder / 'run'}")
        assert outcome.code == 0, outcome.err
        kept["run"] = folder / "run/checkpoints/last.ckpt"
        whole = kept["run"].read_bytes()
        (folder / "whole.ckpt").write_bytes(whole)
        (folder / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
        (folder / "text.ckpt").write_text("hello")
        (folder / "empty.ckpt").write_bytes(b"")
        torch.save({"state_dict": {}}, folder / "other.ckpt")
        stored = torch.load(kept["run"], weights_only=True)
        stored["hyper_parameters"]["optim"]["lr"] = None
        torch.save(stored, folder / "unrated.ckpt")
        torch.save([1, 2], folder / "list.ckpt")
        other = tiny_model("mistral", vocab_size=259, num_key_value_heads=4, sliding_window=4)
        other.save_pretrained(folder / "other")
    return folder


TABLE = {
    "other heads": (
        ("attention.gqa.kv_heads=1",),
        ("attention.gqa.kv_heads: the checkpoint", "given: 1", "valid: 2"),
    ),
    "another merge": (
        ("attention.gqa.merge=first",),
        ("attention.gqa.merge: the checkpoint", "given: first", "valid: mean"),
    ),
    "no operation": (("attention=[]",), ("attention: the checkpoint", "given: []", "valid: [gqa]")),
    "one more": (
        ("attention=[gqa,fuse_qkv]",),
        ("attention: the checkpoint", "given: [gqa, fuse_qkv]", "valid: [gqa]"),
    ),
    "another optimizer": (("optim=muon",), ("optim: the checkpoint", "muon", "valid: adamw")),
    "other parameters": (
        ("optim.parameters=attention",),
        ("optim.parameters: the checkpoint", "valid: all"),
    ),
    "another model": (
        ("model.path={folder}/other",),
        ("model.path: the checkpoint", "its sliding_window differs", "given: 4"),
    ),
    "half a file": (("resume={folder}/cut.ckpt",), ("resume: is no whole checkpoint", "valid:")),
    "a text": (("resume={folder}/text.ckpt",), ("resume: is no whole checkpoint",)),
    "an empty file": (("resume={folder}/empty.ckpt",), ("resume: is no whole checkpoint",)),
    "without a plan": (("resume={folder}/other.ckpt",), ("resume: is a checkpoint of something",)),
    "no rate": (("resume={folder}/unrated.ckpt",), ("resume: the checkpoint does not say its",)),
    "no dictionary": (("resume={folder}/list.ckpt",), ("resume: is a checkpoint of something",)),
}


@pytest.mark.parametrize("name", TABLE)
def test_one_message_that_names_the_key(
    name: str, checkpoints: Path, go: Callable[..., Any], tmp_path: Path
) -> None:
    overrides, says = TABLE[name]
    drop = {one.split("=")[0] for one in overrides}
    given = [one for one in (*GQA, "resume={folder}/whole.ckpt") if one.split("=")[0] not in drop]
    if overrides == ("attention=[]",):
        given = [one for one in given if "gqa" not in one]
    outcome = go(
        *(one.format(folder=checkpoints) if "{folder}" in one else one for one in given),
        *(one.format(folder=checkpoints) if "{folder}" in one else one for one in overrides),
        f"hydra.run.dir={tmp_path / 'run'}",
    )
    assert outcome.code == 2, outcome.err
    message = outcome.err[outcome.err.index("error: ") :]
    assert message.startswith(f"error: {says[0]}")
    assert "Traceback" not in outcome.err
    for part in says:
        assert part in message
    assert not (tmp_path / "run").exists()


def test_heads_that_were_chosen_otherwise(go: Callable[..., Any], tmp_path: Path) -> None:
    """The same operations, but another seed: the weights are those of other heads."""
    prune = (
        "attention=[prune_heads]",
        "attention.prune_heads.amount=0.5",
        "attention.prune_heads.estimator=random",
        "attention.prune_heads.refit=false",
    )
    first = go(*prune, f"hydra.run.dir={tmp_path / 'first'}")
    assert first.code == 0, first.err
    resume = f"resume={tmp_path / 'first/checkpoints/last.ckpt'}"
    other = go(*prune, resume, "seed=1", f"hydra.run.dir={tmp_path / 'other'}")
    assert other.code == 2, other.err
    assert "error: resume: this run's plan takes other heads or tensors" in other.err
    again = go(*prune, resume, "trainer.max_steps=3", f"hydra.run.dir={tmp_path / 'again'}")
    assert again.code == 0, again.err


def test_the_same_run_goes_on(checkpoints: Path, go: Callable[..., Any], tmp_path: Path) -> None:
    """The path of the model, and what only observes, may differ."""
    outcome = go(
        *GQA,
        f"resume={checkpoints / 'whole.ckpt'}",
        "trainer.max_steps=3",
        "callbacks.head_importance=null",
        f"hydra.run.dir={tmp_path}",
    )
    assert outcome.code == 0, outcome.err
    assert json.loads((tmp_path / "summary.json").read_text())["training"]["steps"] == 3
    assert "train.log" not in {path.name for path in tmp_path.iterdir()}
