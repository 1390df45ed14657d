"""The weights with the lowest held-out loss are kept, and training is not changed by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    Callback,
    EMAWeightAveraging,
    StochasticWeightAveraging,
    WeightAveraging,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from surgery.errors import SurgeryError
from surgery.measure.loss import compute_mean_loss
from surgery.training.best_weights import BestWeights, Evaluation, FirstAndLastValidation
from surgery.training.module import SurgeryModule
from tests.training.making import Losses, fit, operated, options, save_model, small_data
from tests.training.test_gating import deferred

Weights = dict[str, torch.Tensor]
WINDOWS = 4
HARMFUL, GENTLE = 0.3, 1e-3


class Snapshots(Callback):
    """The weights after each optimizer step, and those of every validation."""

    def __init__(self) -> None:
        self.trained: dict[int, Weights] = {}
        self.validated: dict[int, Weights] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.trained[trainer.global_step] = copy_weights(pl_module.model)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        self.trained[trainer.global_step] = copy_weights(pl_module.model)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        self.validated[trainer.global_step] = copy_weights(pl_module.model)


def save_calm_model(folder: Path, **fields: Any) -> Path:
    """A model that says little, and that too large a step makes worse than that."""
    save_model(folder, **fields)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] *= 0.05
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def copy_weights(model: torch.nn.Module) -> Weights:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one: Weights, other: Weights) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def heal(
    root: Path,
    *,
    lr: float = GENTLE,
    steps: int = 6,
    every: int = 1,
    keep: bool = True,
    module: SurgeryModule | None = None,
    callbacks: tuple[Callback, ...] = (),
    resume: Path | None = None,
    run: str = "run",
    windows: int = WINDOWS,
    optim: dict[str, Any] | None = None,
    **trainer: Any,
) -> tuple[SurgeryModule, BestWeights, Snapshots, pl.Trainer]:
    """As the pipeline does it."""
    pl.seed_everything(0, verbose=False)
    if not (root / "model").exists():
        save_calm_model(root / "model")
    rate = options("optim", "adamw", warmup_steps=1, lr=lr, **(optim or {}))
    module = module or operated(root / "model", optim=rate)
    (root / run).mkdir(exist_ok=True)
    data, snapshots = small_data(root, isolate_documents=False), Snapshots()
    data.validation_windows = windows
    best = BestWeights(
        root / run / "best.safetensors",
        keep=keep,
        resumed=None if resume is None else str(resume),
        windows=data.hash_validation_rows(),
    )
    done = fit(
        module,
        data,
        root / run,
        callbacks=[best, *callbacks, snapshots, FirstAndLastValidation(best, every)],
        resume=resume,
        **{
            "max_steps": steps,
            "limit_val_batches": None,
            "val_check_interval": every,
            "schedule": {"check_val_every_n_epoch": None},
            **trainer,
        },
    )
    return module, best, snapshots, done


def measure(root: Path, module: SurgeryModule, weights: Weights) -> float:
    """The loss of these weights on the last windows that are held out."""
    assert module.model is not None
    before = copy_weights(module.model)
    module.model.load_state_dict(weights)
    data = small_data(root, isolate_documents=False)
    data.validation_windows = WINDOWS
    batches = data.load_validation_batches(2)
    loss = compute_mean_loss(module.model.eval(), batches, module.task, total=2, label="by hand")
    module.model.load_state_dict(before)
    return loss


@pytest.mark.parametrize("lr", [HARMFUL, GENTLE])
def test_the_lowest_of_all_validations_comes_back(tmp_path: Path, lr: float) -> None:
    module, best, seen, _ = heal(tmp_path, lr=lr)
    losses = {step: measure(tmp_path, module, weights) for step, weights in seen.trained.items()}
    assert [step for step, _ in best.evaluations] == list(range(7))
    for step, loss in best.evaluations:
        assert loss == pytest.approx(losses[step], rel=1e-5)
    assert best.best is not None
    assert best.best.step == min(losses, key=losses.__getitem__)
    assert (best.best.step == 0) is (lr == HARMFUL)  # worse than it began: the untrained weights
    assert module.model is not None
    best.restore_(module.model)
    assert same(copy_weights(module.model), seen.trained[best.best.step])
    assert not same(seen.trained[0], seen.trained[6])
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["best.safetensors"]


def test_training_goes_on_as_without_it(tmp_path: Path) -> None:
    """To the bit, dropout included: validation draws nothing from torch's generator."""
    save_calm_model(tmp_path / "model", attention_dropout=0.3)
    _, _, looked, _ = heal(tmp_path)
    _, best, alone, _ = heal(tmp_path, limit_val_batches=0)
    assert best.evaluations == []
    assert looked.trained.keys() == alone.trained.keys()
    assert all(same(looked.trained[step], alone.trained[step]) for step in alone.trained)


def test_only_what_is_trained_is_written(tmp_path: Path) -> None:
    module, best, seen, _ = heal(tmp_path, lr=0.02, optim={"parameters": "output"})
    assert best.best is not None
    with safe_open(best.file, "pt") as opened:
        names = set(opened.keys())
        assert opened.metadata()["step"] == str(best.best.step)
    assert names == {f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (0, 1)}
    assert module.model is not None
    best.restore_(module.model)
    assert same(copy_weights(module.model), seen.trained[best.best.step])


def test_the_last_are_kept_where_that_is_wanted(tmp_path: Path) -> None:
    module, best, seen, _ = heal(tmp_path, lr=HARMFUL, keep=False)
    assert best.best == best.evaluations[0]
    assert not best.file.exists()
    assert module.model is not None
    best.restore_(module.model)
    assert same(copy_weights(module.model), seen.trained[6])


def test_the_ends_are_looked_at_whatever_the_cadence(tmp_path: Path) -> None:
    _, best, _, _ = heal(tmp_path, steps=5, every=3)
    assert [step for step, _ in best.evaluations] == [0, 3, 5]
    accumulated = {"accumulate_grad_batches": 2, "val_check_interval": 4}
    _, best, _, _ = heal(tmp_path, steps=4, every=2, **accumulated)
    assert [step for step, _ in best.evaluations] == [0, 2, 4]
    _, best, _, _ = heal(tmp_path, every=2, callbacks=(Losses(stop=3),))
    assert [step for step, _ in best.evaluations] == [0, 2, 3]


def test_what_was_written_must_still_be_there(tmp_path: Path) -> None:
    module, best, _, _ = heal(tmp_path, steps=1)
    assert module.model is not None
    best.file.write_bytes(b"something else")
    with pytest.raises(SurgeryError, match="no longer holds the weights of step"):
        best.restore_(module.model)


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    """Where the file should be there is a folder."""
    (tmp_path / "run" / "best.safetensors.partial").mkdir(parents=True)
    with pytest.raises(SurgeryError, match=r"best\.safetensors cannot be written"):
        heal(tmp_path, steps=1)


@pytest.mark.parametrize(
    ("windows", "rows", "shared"), [(2, 2, 0), (3, 3, 1), (None, 5, 3), (99, 5, 3)]
)
def test_other_windows_than_those_that_are_measured_are_looked_at(
    tmp_path: Path, windows: int | None, rows: int, shared: int
) -> None:
    data = small_data(tmp_path)
    assert data.held_out_size == 5
    data.validation_windows = windows
    seen = torch.cat([batch["input_ids"] for batch in data.val_dataloader()])
    everything = next(data.load_held_out_batches(5, 5))["input_ids"]
    assert data.count_validation_rows() == rows
    assert data.count_shared_rows(3) == shared
    assert torch.equal(seen, everything[5 - rows :])
    assert torch.equal(seen, torch.cat([b["input_ids"] for b in data.load_validation_batches(2)]))


# After a stop.


@pytest.mark.parametrize(("lr", "place"), [(HARMFUL, "another run"), (GENTLE, "same run")])
def test_a_resumed_training_goes_on(tmp_path: Path, lr: float, place: str) -> None:
    straight, whole, _, _ = heal(tmp_path, lr=lr, run="straight")
    _, _, _, stopped = heal(tmp_path, lr=lr, callbacks=(Losses(stop=3),))
    checkpoint = tmp_path / "run" / "checkpoints" / "three.ckpt"
    stopped.save_checkpoint(checkpoint)
    run = "run" if place == "same run" else "other"
    resumed, best, _, _ = heal(tmp_path, lr=lr, resume=checkpoint, run=run)
    assert best.evaluations == whole.evaluations
    assert (best.first, best.best) == (whole.first, whole.best)
    assert straight.model is not None
    assert resumed.model is not None
    whole.restore_(straight.model)
    best.restore_(resumed.model)
    assert same(copy_weights(resumed.model), copy_weights(straight.model))


def test_weights_that_are_gone_are_not_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run went on after its checkpoint and kept better weights, which are not on that way."""
    _, first, _, stopped = heal(tmp_path, lr=HARMFUL, steps=2)
    stopped.save_checkpoint(tmp_path / "run" / "two.ckpt")
    first.best = Evaluation(9, 0.1)
    first._write(torch.nn.Linear(1, 1))
    resumed, best, _, _ = heal(
        tmp_path, lr=HARMFUL, steps=4, resume=tmp_path / "run" / "two.ckpt", run="run"
    )
    assert "the best weights so far (step 0) are not beside the checkpoint" in (
        capsys.readouterr().out
    )
    assert best.first is not None
    assert best.best is not None
    assert min(best.first.step, best.best.step) >= 2
    assert resumed.model is not None
    best.restore_(resumed.model)


def test_losses_on_other_windows_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint's best loss is of windows that the resumed training does not look at."""
    _, _, _, stopped = heal(tmp_path, lr=HARMFUL, steps=2)
    stopped.save_checkpoint(tmp_path / "run" / "two.ckpt")
    options = {"lr": HARMFUL, "steps": 3, "resume": tmp_path / "run" / "two.ckpt"}
    module, best, seen, _ = heal(tmp_path, windows=WINDOWS - 2, **options)
    assert "other windows are held out than before" in capsys.readouterr().out
    assert [step for step, _ in best.evaluations] == [2, 3]
    assert best.first == best.evaluations[0]
    assert best.best == min(best.evaluations, key=lambda one: one.loss)
    assert module.model is not None
    best.restore_(module.model)
    assert same(copy_weights(module.model), seen.trained[best.best.step])


def test_a_file_of_an_earlier_run_is_removed(tmp_path: Path) -> None:
    heal(tmp_path, steps=1)
    module = operated(tmp_path / "model", optim=options("optim", "adamw"))
    _, best, _, _ = heal(tmp_path, steps=1, module=module, limit_val_batches=0)
    assert best.best is None
    assert not best.file.exists()


# While an operation is decided.


def test_nothing_is_kept_before_the_heads_are_closed(tmp_path: Path) -> None:
    """The whole model is far better; but it is not what comes out."""
    folder = save_calm_model(tmp_path / "model")
    module = operated(
        folder,
        attention={},
        optim=options("optim", "adamw", warmup_steps=1, lr=HARMFUL),
        deferred=deferred("gradual", amount=0.5, until=0.5),
    )
    module, best, seen, trainer = heal(tmp_path, module=module, steps=8)
    losses = dict(best.evaluations)
    assert list(losses) == list(range(9))
    assert min(losses, key=losses.__getitem__) < 4
    assert best.first is not None
    assert best.best is not None
    assert best.first.step == 4
    later = {step: loss for step, loss in losses.items() if step >= 4}
    assert best.best.step == min(later, key=later.__getitem__)
    assert module.model is not None
    assert module.decision is not None
    best.restore_(module.model)
    assert same(copy_weights(module.model), seen.trained[best.best.step])
    module.decision.finish(trainer)


# Averaged weights: what is kept is what was validated.


class Average(WeightAveraging):
    """Of all steps, equally weighted."""


def test_averaging_rounds_nothing_that_is_computed(tmp_path: Path) -> None:
    """Without any validation, too."""
    average = EMAWeightAveraging(decay=0.9)
    module, _, _, _ = heal(tmp_path, callbacks=(average,), limit_val_batches=0)
    fresh = operated(tmp_path / "model").source.load()
    assert module.model is not None
    inv_freq = module.model.get_buffer("model.rotary_emb.inv_freq")
    assert torch.equal(inv_freq, fresh.get_buffer("model.rotary_emb.inv_freq"))
    rounded = average._average_model.module.model.model.rotary_emb.inv_freq
    assert not torch.equal(inv_freq, rounded)  # else this test could not fail


def averages() -> dict[str, Callback]:
    return {
        "ema": EMAWeightAveraging(decay=0.9),
        "average": Average(),
        "swa": StochasticWeightAveraging(1e-3, swa_epoch_start=1, annealing_epochs=1),
    }


@pytest.mark.parametrize(
    ("name", "model", "lr"),
    [
        ("ema", "bert", HARMFUL),
        ("ema", "llama", GENTLE),
        ("average", "llama", GENTLE),
        ("swa", "llama", HARMFUL),
    ],
)
def test_averaged_weights_are_validated_and_kept(
    tmp_path: Path, name: str, model: str, lr: float
) -> None:
    """BERT has positions, whole numbers, among its computed buffers."""
    folder = tmp_path / "model"
    kind: dict[str, Any] = {}
    if model == "bert":
        save_model(folder, name=model)
        kind = {"task": "masked_lm", "attention": {"attention_dropout": {"p": 0.1}}}
    else:
        save_calm_model(folder)
    optim = options("optim", "adamw", warmup_steps=1, lr=lr, parameters="attention")
    module = operated(folder, objective=options("objective", "distill"), optim=optim, **kind)
    average, steps = averages()[name], {"steps": 6}
    if name == "swa":
        module.configure_model()  # as the pipeline does
        steps = {"steps": -1, "max_epochs": 3, "limit_train_batches": 2}
    module, best, seen, _ = heal(tmp_path, module=module, callbacks=(average,), **steps)
    lowest, last = min(best.evaluations, key=lambda one: one.loss), best.evaluations[-1]
    assert best.best == lowest
    for step, loss in best.evaluations[:-1] if name == "swa" else best.evaluations:
        weights = seen.trained[step] if name == "swa" else seen.validated[step]
        assert loss == pytest.approx(measure(tmp_path, module, weights), rel=1e-5)
    # What training ends with was validated; it is not what the last step left.
    final = copy_weights(module.model)
    assert not same(final, seen.trained[6])
    frozen = {k: w for k, w in final.items() if "self_attn" not in k and "attention" not in k}
    assert len(frozen) > 2
    assert same(frozen, seen.trained[0])
    assert last.loss == pytest.approx(measure(tmp_path, module, final), rel=1e-5)
    computed = dict(operated(folder, **kind).source.load().named_buffers())
    assert computed
    for place, buffer in module.model.named_buffers():
        assert torch.equal(buffer, computed[place]), place
    best.restore_(module.model)
    if name == "swa":
        kept = final if lowest == last else seen.trained[lowest.step]
    else:
        kept = seen.validated[lowest.step]
        assert average._average_model.module._teacher is module._teacher  # no second one
    assert same(copy_weights(module.model), kept)
