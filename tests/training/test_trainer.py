"""`trainer.*` reaches Lightning, and what Lightning refuses is a config error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from surgery.errors import ConfigError
from surgery.training.trainer import build_trainer, forget_profile, say_profile
from tests.training.making import fit, operated, options, save_model, small_data


class Logits(Callback):
    """The dtypes in which the model answered."""

    def __init__(self) -> None:
        self.dtypes: set[torch.dtype] = set()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.model.register_forward_hook(
            lambda model, inputs, output: self.dtypes.add(output.logits.dtype)
        )


class Gradients(Callback):
    """Norm and largest value of each step's gradient, as the optimizer met it."""

    def __init__(self) -> None:
        self.sizes: list[tuple[float, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        flat = torch.cat([p.grad.flatten() for p in pl_module.model.parameters()])
        self.sizes.append((float(flat.norm()), float(flat.abs().max())))


@pytest.mark.parametrize("accumulated", [1, 2, 4])
def test_gradients_are_accumulated(tmp_path: Path, accumulated: int) -> None:
    module = operated(save_model(tmp_path / "model"))
    trainer = fit(
        module, small_data(tmp_path), tmp_path, max_steps=2, accumulate_grad_batches=accumulated
    )
    assert trainer.global_step == 2
    assert trainer.fit_loop.epoch_loop.batch_progress.total.processed == 2 * accumulated


def test_accumulated_gradients_are_those_of_one_large_batch(tmp_path: Path) -> None:
    """Packed windows without isolation: every batch has as many labels as every other."""
    folder = save_model(tmp_path / "model")
    weights = []
    for size, accumulated in ((4, 1), (2, 2)):
        module = operated(folder, optim=options("optim", "adamw", warmup_steps=0))
        data = small_data(tmp_path, batch_size=size, isolate_documents=False)
        fit(module, data, tmp_path, max_steps=1, accumulate_grad_batches=accumulated)
        assert module.model is not None
        weights.append(module.model.state_dict())
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], msg=name)


@pytest.mark.parametrize(("algorithm", "clip"), [("norm", 1e-3), ("value", 1e-4), (None, 1e-3)])
def test_gradients_are_clipped(tmp_path: Path, algorithm: str | None, clip: float) -> None:
    module = operated(save_model(tmp_path / "model"))
    gradients = Gradients()
    fit(
        module,
        small_data(tmp_path),
        tmp_path,
        max_steps=1,
        callbacks=[gradients],
        gradient_clip_val=clip,
        gradient_clip_algorithm=algorithm,
    )
    ((norm, largest),) = gradients.sizes
    assert (largest if algorithm == "value" else norm) == pytest.approx(clip, rel=1e-3)


@pytest.mark.parametrize(
    ("precision", "logits", "weights"),
    [
        ("32-true", torch.float32, torch.float32),
        ("bf16-mixed", torch.bfloat16, torch.float32),
        ("bf16-true", torch.bfloat16, torch.bfloat16),
    ],
)
def test_precision(
    tmp_path: Path, precision: str, logits: torch.dtype, weights: torch.dtype
) -> None:
    module = operated(save_model(tmp_path / "model"))
    answered = Logits()
    fit(
        module,
        small_data(tmp_path),
        tmp_path,
        max_steps=2,
        precision=precision,
        callbacks=[answered],
    )
    assert answered.dtypes == {logits}
    assert module.model is not None
    assert {p.dtype for p in module.model.parameters()} == {weights}


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"precision": "8-bit"}, "Precision '8-bit' is invalid"),
        ({"accelerator": "abacus"}, "abacus"),
        ({"devices": 0}, "devices=0"),
        ({"strategy": "wishful"}, "wishful"),
        ({"limit_train_batches": 1.5}, "limit_train_batches"),
        ({"max_time": "soon"}, "soon"),
        ({"gradient_clip_val": 1.0, "gradient_clip_algorithm": "x"}, "gradient_clip_algorithm"),
        ({"profiler": "x"}, "profiler"),
        ({"max_steps": -5}, "max_steps"),
        ({"unheard_of": 1}, "unheard_of"),
    ],
)
def test_what_lightning_refuses(tmp_path: Path, given: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_trainer({"accelerator": "cpu"} | given, run_dir=tmp_path, callbacks=[], loggers=[])
    assert caught.value.key == "trainer"
    assert text in caught.value.problem


@pytest.mark.parametrize("given", [{"accumulate_grad_batches": 0}, {"log_every_n_steps": "often"}])
def test_what_lightning_would_fail_on_later(tmp_path: Path, given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        build_trainer(given, run_dir=tmp_path, callbacks=[], loggers=[])
    assert caught.value.key == f"trainer.{next(iter(given))}"


def test_null_leaves_lightnings_default(tmp_path: Path) -> None:
    trainer = build_trainer(
        options("trainer", "default", accelerator="cpu"),
        run_dir=tmp_path,
        callbacks=[],
        loggers=[],
    )
    plain = pl.Trainer(accelerator="cpu", logger=False, max_steps=100)
    for name in ("max_epochs", "min_steps", "limit_val_batches", "val_check_interval"):
        assert getattr(trainer, name) == getattr(plain, name)
    assert trainer.max_steps == 100
    assert trainer.default_root_dir == str(tmp_path)


@pytest.mark.parametrize("strategy", ["deepspeed", "deepspeed_stage_3"])
def test_deepspeed_without_cuda(tmp_path: Path, strategy: str) -> None:
    with pytest.raises(ConfigError, match="DeepSpeed trains on CUDA devices only") as caught:
        build_trainer(
            {"accelerator": "cpu", "strategy": strategy}, run_dir=tmp_path, callbacks=[], loggers=[]
        )
    assert caught.value.key == "trainer.strategy"


def test_a_profile_is_written_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_model(tmp_path / "model")
    for _ in range(2):  # the second run's profile is its own, not both
        forget_profile(tmp_path)
        trainer = fit(
            operated(folder), small_data(tmp_path), tmp_path, max_steps=1, profiler="simple"
        )
    say_profile(trainer, tmp_path)
    file = tmp_path / "fit-profile.txt"
    assert f"profile: {file}" in capsys.readouterr().out
    assert file.read_text().count("FIT Profiler Report") == 1
    assert "training_step" in file.read_text()
    say_profile(fit(operated(folder), small_data(tmp_path), tmp_path, max_steps=1), tmp_path)
    assert "profile" not in capsys.readouterr().out  # that of an earlier run


def test_a_checkpoint_is_whole_or_not_there(tmp_path: Path) -> None:
    trainer = fit(
        operated(save_model(tmp_path / "model")), small_data(tmp_path), tmp_path, max_steps=1
    )
    file = tmp_path / "new" / "one.ckpt"
    trainer.save_checkpoint(file)
    before = file.read_bytes()
    assert torch.load(file, weights_only=True)["global_step"] == 1
    unsaved = {"state_dict": {}, "cannot be saved": lambda: 0}
    with pytest.raises(Exception, match="pickle"):
        trainer.strategy.checkpoint_io.save_checkpoint(unsaved, file)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["one.ckpt"]
