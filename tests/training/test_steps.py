"""Training and validation steps of the module itself."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from pytorch_lightning.callbacks import Callback

from surgery.data.collate import IGNORED
from surgery.errors import SurgeryError
from tests.training.making import Losses, fit, operated, options, save_model, small_data


class Poison(Callback):
    """One weight is no number from step 2 on."""

    def on_train_batch_start(self, trainer, module, batch, index) -> None:  # type: ignore[no-untyped-def]
        if trainer.global_step == 2:
            with torch.no_grad():
                module.model.lm_head.weight[0, 0] = float("nan")


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    module = operated(save_model(tmp_path / "model"))
    with pytest.raises(SurgeryError, match=r"loss is nan at step 2; lower optim\.lr"):
        fit(module, small_data(tmp_path), tmp_path, max_steps=4, callbacks=[Poison()])


def test_a_batch_without_labels_is_called_that(tmp_path: Path) -> None:
    module = operated(save_model(tmp_path / "model"))
    module.configure_model()
    ids = torch.arange(5, 11).reshape(2, 3)
    batch = {"input_ids": ids, "labels": torch.full_like(ids, IGNORED)}
    with pytest.raises(SurgeryError, match="no position of this batch carries a label"):
        module.training_step(batch, 0)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_validation_loss_is_the_mean_over_tokens(tmp_path: Path, layout: str) -> None:
    """Rows differ in length, and documents are kept apart, as in training."""
    module = operated(save_model(tmp_path / "model"))
    data = small_data(tmp_path, layout=layout)
    trainer = fit(module, data, tmp_path, max_epochs=1, max_steps=-1, limit_val_batches=1.0)
    logged = float(trainer.callback_metrics["val/loss"])
    assert module.model is not None
    model = module.model.eval()
    nll, count = 0.0, 0
    for row in data._held_out or []:
        ids = torch.tensor(row["input_ids"])
        places = torch.tensor(row.get("position_ids", list(range(len(ids)))))
        starts = [*torch.nonzero(places == 0).flatten().tolist(), len(ids)]
        for start, stop in pairwise(starts):
            alone = ids[start:stop]
            with torch.no_grad():
                log_p = model(input_ids=alone[None]).logits[0].log_softmax(-1)
            nll -= float(log_p[:-1].gather(1, alone[1:, None]).sum())
            count += len(alone) - 1
    assert logged == pytest.approx(nll / count, rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_rope_keeps_its_frequencies_in_any_precision(tmp_path: Path, precision: str) -> None:
    folder = save_model(tmp_path / "model")
    module = operated(folder)
    fit(module, small_data(tmp_path), tmp_path, max_steps=2, precision=precision)
    assert module.model is not None
    trained, original = module.model, operated(folder).source.load()
    assert trained.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float64)
    assert torch.equal(trained.model.rotary_emb.inv_freq, original.model.rotary_emb.inv_freq)


def test_healing_brings_the_model_back_to_its_teacher(tmp_path: Path) -> None:
    module = operated(
        save_model(tmp_path / "model"),
        objective=options("objective", "distill"),
        optim=options("optim", "adamw", lr=1e-2),
    )
    losses = Losses()
    fit(module, small_data(tmp_path), tmp_path, max_steps=40, callbacks=[losses])
    assert sum(losses.values[-4:]) < 0.5 * sum(losses.values[:4])


def test_an_adopted_model_is_used_as_it_is(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    made = operated(folder)
    made.configure_model()
    assert made.model is not None
    teacher = made.source.load()
    module = operated(folder, objective=options("objective", "distill"))
    module.adopt(made.model, teacher)
    fit(module, small_data(tmp_path), tmp_path, max_steps=1)
    assert module.model is made.model
    assert module._teacher == [teacher]
    assert not any(p.requires_grad for p in teacher.parameters())
