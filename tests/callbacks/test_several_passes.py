"""A step that runs its model several times is observed like one that runs it once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from surgery.callbacks import AttentionStatistics, HeadImportance

from surgery.config.schema import Task
from surgery.importance import score_heads
from tests.callbacks.fitting import Batch, OwnModule, by_layer, fit, padded, unpadded
from tests.callbacks.gates import importance
from tests.families import masked_lm
from tests.families import tokens as few_tokens
from tests.tiny_models import tiny_model, tokens

WHOLE = unpadded(tokens(4, 10))
PARTS = [{name: tensor[rows] for name, tensor in WHOLE.items()} for rows in (slice(2), slice(2, 4))]


class Step(OwnModule):
    """Its training step is `step(module, batch)`, which returns a loss or optimizes by hand."""

    def __init__(self, net: Any, step: Callable[[Any, Batch], Any], *, by_hand: bool = False):
        super().__init__(net)
        self.step = step
        self.automatic_optimization = not by_hand

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return self.step(self, batch)

    def loss(self, batch: Batch, **options: Any) -> torch.Tensor:
        loss = self.net(**batch, **options).loss
        assert isinstance(loss, torch.Tensor)
        return loss


def split(batch: Batch) -> list[Batch]:
    parts = zip(*(tensor.chunk(2) for tensor in batch.values()), strict=True)
    return [dict(zip(batch, part, strict=True)) for part in parts]


def twice(module: Step, batch: Batch) -> torch.Tensor:
    return (module.loss(batch) + module.loss(batch)) / 2


def in_halves(module: Step, batch: Batch) -> torch.Tensor:
    return torch.stack([module.loss(half) for half in split(batch)]).mean()


def beside_unused_passes(module: Step, batch: Batch) -> torch.Tensor:
    module.loss(batch)
    with torch.no_grad():
        module.loss(batch)
    return module.loss(batch)


def halves_by_hand(module: Step, batch: Batch) -> None:
    optimizer = module.optimizers()
    optimizer.zero_grad()
    for half in split(batch):
        module.manual_backward(module.loss(half) / 2)
    optimizer.step()


def bare_backward(module: Step, batch: Batch) -> None:
    for half in split(batch):
        (module.loss(half) / 2).backward()
    module.optimizers().step()


def two_optimizer_steps(module: Step, batch: Batch) -> None:
    for _ in range(2):
        module.manual_backward(module.loss(batch))
        module.optimizers().step()


def two_losses_of_one_pass(module: Step, batch: Batch) -> None:
    loss = module.loss(batch)
    module.manual_backward(3 * loss, retain_graph=True)
    module.manual_backward(-2 * loss)
    module.optimizers().step()


STEPS = {
    "twice": (twice, False),
    "in halves": (in_halves, False),
    "beside unused passes": (beside_unused_passes, False),
    "halves by hand": (halves_by_hand, True),
    "bare backward": (bare_backward, True),
    "two optimizer steps": (two_optimizer_steps, True),
    "two losses of one pass": (two_losses_of_one_pass, True),
}


def observe(module: pl.LightningModule, batches: list[Any], root: Path, **options: Any) -> Any:
    monitor = HeadImportance(1, 1)
    fit(module, batches, [monitor], root, **options)
    assert [seen["step"] for seen in monitor.observations] == [0]
    return torch.stack(by_layer(monitor.observations[0], "head_importance"))


@pytest.mark.parametrize(
    ("case", "checkpointing"),
    [
        *((case, None) for case in STEPS),
        # Checkpointing gives back a pass only once: no two losses of it.
        *((case, reentrant) for case in list(STEPS)[:-1] for reentrant in (True, False)),
    ],
)
def test_the_same_loss_has_the_same_importance(
    case: str, checkpointing: bool | None, tmp_path: Path
) -> None:
    step, by_hand = STEPS[case]
    model = tiny_model("llama")
    expected = importance(model, WHOLE)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    got = observe(Step(model, step, by_hand=by_hand), [WHOLE], tmp_path)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)


def test_batches_accumulated_by_hand(tmp_path: Path) -> None:
    def accumulate(module: Step, batch: Batch) -> None:
        module.manual_backward(module.loss(batch) / 2)
        if module.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            module.optimizers().step()

    model = tiny_model("gpt2")
    got = observe(Step(model, accumulate, by_hand=True), PARTS, tmp_path)
    torch.testing.assert_close(got, importance(model, WHOLE), rtol=1e-4, atol=1e-7)


def test_a_gradient_that_waits_for_its_step(tmp_path: Path) -> None:
    """Each batch first steps on the gradient of the batch before."""

    def step_late(module: Step, batch: Batch) -> None:
        module.optimizers().step()
        module.manual_backward(module.loss(batch))

    model = tiny_model("llama")
    monitor = HeadImportance(every_n_steps=9, heatmap_every_n_steps=9)
    fit(Step(model, step_late, by_hand=True), [WHOLE, PARTS[0]], [monitor], tmp_path)
    (seen,) = monitor.observations
    assert seen["step"] == 0
    got = torch.stack(by_layer(seen, "head_importance"))
    torch.testing.assert_close(got, importance(model, WHOLE), rtol=1e-4, atol=1e-7)


def test_accumulated_batches_of_two_passes(tmp_path: Path) -> None:
    """Lightning divides each batch's loss; the examples of uneven batches weigh the same."""
    batches = [padded(tokens(3, 10), 10, 4, 7), unpadded(tokens(2, 8, seed=1))]
    model = tiny_model("llama")
    expected = importance(model, *batches)
    got = observe(Step(model, twice), batches, tmp_path, accumulate_grad_batches=2)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)


def test_layers_that_share_a_block_have_one_gate(tmp_path: Path) -> None:
    """ALBERT: the monitor says what the score of the same head is."""
    model = masked_lm("albert", num_hidden_groups=1).float()
    batch = unpadded(few_tokens(3, 10))
    table = score_heads(model, [batch], "gate_gradient", units=("heads",), task=Task.masked_lm)
    assert table.heads is not None
    got = observe(OwnModule(model), [batch], tmp_path)
    torch.testing.assert_close(got, torch.tensor([table.heads[0].scores]), rtol=1e-4, atol=1e-7)


def read_statistics(module: pl.LightningModule, batch: Any, root: Path) -> dict[str, torch.Tensor]:
    monitor = AttentionStatistics(1, 1, rows=None)
    fit(module, [batch], [monitor], root)
    (seen,) = monitor.observations
    return seen["metrics"]


def named_otherwise(module: Step, batch: Batch) -> torch.Tensor:
    """DPO's batch: the names are not the model's."""
    first, second = (
        module.loss({k.removeprefix(name): v for k, v in batch.items() if k.startswith(name)})
        for name in ("chosen_", "rejected_")
    )
    return (first + second) / 2


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "case", ["in halves", "halves by hand", "bare backward", "named otherwise"]
)
def test_statistics_are_those_of_all_rows(case: str, checkpointing: bool, tmp_path: Path) -> None:
    """Each pass has rows, masks and tokens of its own; what backward runs again is not counted."""
    whole = padded(tokens(4, 10), 3, 10, 7, 5)
    expected = read_statistics(OwnModule(tiny_model("llama")), whole, tmp_path)
    model = tiny_model("llama")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": True})
    step, by_hand = STEPS.get(case, (named_otherwise, False))
    batch = whole
    if case == "named otherwise":
        halves = zip(("chosen_", "rejected_"), split(whole), strict=True)
        batch = {name + k: v for name, half in halves for k, v in half.items()}
    got = read_statistics(Step(model, step, by_hand=by_hand), batch, tmp_path)
    assert got.keys() == expected.keys()
    for name, figures in expected.items():
        assert figures.isfinite().all()
        torch.testing.assert_close(got[name], figures, rtol=1e-4, atol=1e-6, msg=name)


def test_the_second_half_has_masks_of_its_own(tmp_path: Path) -> None:
    """With another length in each pass, no mask of the batch would fit."""

    def uneven(module: Step, batch: Any) -> torch.Tensor:
        return torch.stack([module.loss(part) for part in batch]).mean()

    parts = [padded(tokens(2, 9), 4, 9), padded(tokens(3, 6, seed=1), 6, 2, 5)]
    names = ["attention_entropy", "previous_token"]
    monitor = AttentionStatistics(1, 1, rows=None, metrics=names)
    fit(Step(tiny_model("llama"), uneven), [parts], [monitor], tmp_path)
    apart = AttentionStatistics(1, 1, rows=None, metrics=names)
    fit(OwnModule(tiny_model("llama")), parts, [apart], tmp_path, accumulate_grad_batches=2)
    (got,), (expected,) = monitor.observations, apart.observations
    for name, figures in expected["metrics"].items():
        torch.testing.assert_close(got["metrics"][name], figures, rtol=1e-4, atol=1e-6)
