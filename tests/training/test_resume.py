"""Six steps straight are three steps, a checkpoint, and three more: to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training.making import Losses, fit, operated, options, save_model, small_data


@pytest.mark.parametrize(
    ("objective", "parameters"),
    [("lm", "all"), ("distill", "all"), ("distill_attention", "attention"), ("lm", "changed")],
)
@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_losses_and_weights_are_the_same(
    tmp_path: Path, objective: str, parameters: str, optim: str
) -> None:
    folder = save_model(tmp_path / "model")

    def run(stop: int | None = None, resume: Path | None = None) -> tuple:
        module = operated(
            folder,
            objective=options("objective", objective),
            optim=options("optim", optim, warmup_steps=2, parameters=parameters),
        )
        losses = Losses(stop)
        trainer = fit(
            module, small_data(tmp_path), tmp_path, max_steps=6, resume=resume, callbacks=[losses]
        )
        return module, trainer, losses.values

    straight, _, losses = run()
    assert len(losses) == 6
    assert len(set(losses)) == 6
    _, interrupted, first = run(stop=3)
    interrupted.save_checkpoint(tmp_path / "three.ckpt")
    resumed, trainer, second = run(resume=tmp_path / "three.ckpt")
    assert trainer.global_step == 6
    assert first + second == losses
    original = operated(folder)
    original.configure_model()
    for (name, a), (_, b), (_, o) in zip(
        *(module.model.named_parameters() for module in (straight, resumed, original)), strict=True
    ):
        assert torch.equal(a, b), name
        assert torch.equal(a, o) is not a.requires_grad, name
