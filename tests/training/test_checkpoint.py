"""A checkpoint stands alone: no original model, no teacher, nothing but weights to trust."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from surgery.training.module import SurgeryModule
from tests.tiny_models import tokens
from tests.training.making import fit, operated, options, save_model, small_data

IDS = tokens(2, 40)


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        (torch.float32, "float32"),
        (torch.float32, "bfloat16"),
        (torch.bfloat16, "auto"),
        (torch.bfloat16, "float32"),
    ],
)
@pytest.mark.parametrize("attention", ["sdpa", "eager", None])
def test_it_reloads_to_the_very_model(
    tmp_path: Path, stored: torch.dtype, dtype: str, attention: str | None
) -> None:
    folder = save_model(tmp_path / "model", stored)
    module = operated(folder, dtype=dtype, attn_implementation=attention)
    trainer = fit(module, small_data(tmp_path), tmp_path, max_steps=2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    shutil.rmtree(folder)
    again = SurgeryModule.load_from_checkpoint(tmp_path / "two.ckpt", weights_only=True)
    assert again.model is not None
    assert module.model is not None
    assert again.model.dtype == module.model.dtype
    assert again.model.config._attn_implementation == module.model.config._attn_implementation
    positions = torch.arange(4000, 4040)[None]
    with torch.inference_mode():
        live, reloaded = (
            m.model.eval()(input_ids=IDS, position_ids=positions).logits for m in (module, again)
        )
    assert torch.equal(live, reloaded)


def test_it_reloads_in_another_process_without_the_original(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    module = operated(folder, objective=options("objective", "distill"))
    trainer = fit(module, small_data(tmp_path), tmp_path, max_steps=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    shutil.rmtree(folder)
    program = """
import sys, json, torch
from surgery.training.module import SurgeryModule
module = SurgeryModule.load_from_checkpoint(sys.argv[1], weights_only=True).eval()
ids = torch.tensor(json.loads(sys.argv[2]))
with torch.inference_mode():
    torch.save(module.model(input_ids=ids).logits, sys.argv[3])
"""
    arguments = [str(tmp_path / "one.ckpt"), json.dumps(IDS.tolist()), str(tmp_path / "logits")]
    subprocess.run(
        [sys.executable, "-c", program, *arguments], check=True, cwd=tmp_path, timeout=300
    )
    assert module.model is not None
    with torch.inference_mode():
        live = module.model.eval()(input_ids=IDS).logits
    assert torch.equal(torch.load(tmp_path / "logits"), live)


def test_the_teacher_is_only_looked_at(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    module = operated(folder, objective=options("objective", "distill"))
    trainer = fit(module, small_data(tmp_path), tmp_path, max_steps=2)
    (teacher,) = module._teacher
    original = operated(folder).source.load()
    for (name, a), (_, b) in zip(
        teacher.named_parameters(), original.named_parameters(), strict=True
    ):
        assert a.grad is None
        assert not a.requires_grad
        assert torch.equal(a, b), name
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert module.model is not None
    assert held == {id(p) for p in module.model.parameters()}
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    checkpoint = torch.load(tmp_path / "two.ckpt", weights_only=True)
    expected = {f"model.{name}": tensor for name, tensor in module.model.state_dict().items()}
    assert checkpoint["state_dict"].keys() == expected.keys()
    # Multi-query is smaller: had the teacher's tensors been saved, shapes would tell.
    assert all(checkpoint["state_dict"][name].shape == expected[name].shape for name in expected)


def test_only_the_checkpoint_forgets_the_original(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    module = operated(folder)
    trainer = fit(module, small_data(tmp_path), tmp_path, max_steps=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    assert module.hparams["load_weights"] is True
    hparams = torch.load(tmp_path / "one.ckpt", weights_only=True)["hyper_parameters"]
    assert hparams["load_weights"] is False


def test_building_twice_changes_nothing(tmp_path: Path) -> None:
    module = operated(save_model(tmp_path / "model"))
    module.configure_model()
    model = module.model
    assert model is not None
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    module.configure_model()
    assert module.model is model
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
